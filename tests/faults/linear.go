package faults

import (
	"fmt"
	"math"
	"time"

	"github.com/anishathalye/porcupine"
)

// register is the model of one register: its state is its value.
var register = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[int][]porcupine.Operation{}
		for _, o := range history {
			key := o.Input.(Op).Key
			byKey[key] = append(byKey[key], o)
		}
		var parts [][]porcupine.Operation
		for _, p := range byKey {
			parts = append(parts, p)
		}
		return parts
	},
	Init: func() any { return 0 },
	Step: func(state, input, _ any) (bool, any) {
		value, op := state.(int), input.(Op)
		switch op.Kind {
		case Read:
			return op.Value == value, value
		case Write:
			return true, op.Value
		default:
			if value == op.Old {
				return op.Swapped || op.Outcome == Unknown, op.Value
			}
			return !op.Swapped, value
		}
	},
	DescribeOperation: func(input, _ any) string {
		op := input.(Op)
		return fmt.Sprintf("%s %s %d: %d→%d %v %s", op.Client, op.Kind, op.Key, op.Old, op.Value, op.Swapped, op.Outcome)
	},
}

// Linearizable checks that the operations on registers, which all hold 0 at
// first, could have been done one after the other, each between its call and
// its return. One whose outcome is unknown may have been done at any time after
// its call, or never. It gives up, with an error, after the time limit.
func Linearizable(ops []Op, limit time.Duration) error {
	var history []porcupine.Operation
	clients := map[string]int{}
	for _, op := range ops {
		if op.Kind == Append || op.Outcome == Refused || op.Kind == Read && op.Outcome != Done {
			continue
		}
		client, ok := clients[op.Client]
		if !ok {
			client = len(clients)
			clients[op.Client] = client
		}
		end := int64(op.Return)
		if op.Outcome == Unknown {
			end = math.MaxInt64
		}
		history = append(history, porcupine.Operation{ClientId: client, Input: op, Call: int64(op.Invoke), Output: op, Return: end})
	}
	switch porcupine.CheckOperationsTimeout(register, history, limit) {
	case porcupine.Ok:
		return nil
	case porcupine.Unknown:
		return fmt.Errorf("cannot tell within %s whether %d operations are linearizable", limit, len(history))
	}
	return fmt.Errorf("%d operations are not linearizable: no order of them explains what was read", len(history))
}
