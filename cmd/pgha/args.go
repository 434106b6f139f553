package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// flagsFirst puts a command's flags before its arguments, in whichever order they
// were typed: the library reads none behind the first argument. What follows "--"
// stays an argument.
func flagsFirst(app *cli.App, args []string) []string {
	if len(args) == 0 || slices.Contains(args, "--generate-bash-completion") {
		return args
	}
	var command *cli.Command
	i := 1
	for commands := app.Commands; i < len(args); i++ {
		k := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(args[i]) })
		if k < 0 {
			break
		}
		command = commands[k]
		commands = command.Subcommands
	}
	if command == nil || command.SkipFlagParsing {
		return args
	}
	var flags, rest []string
	for typed := args[i:]; len(typed) > 0; typed = typed[1:] {
		a := typed[0]
		if a == "--" {
			rest = append(rest, typed[1:]...)
			break
		}
		if len(a) < 2 || a[0] != '-' {
			rest = append(rest, a)
			continue
		}
		flags = append(flags, a)
		if takesValue(command, a) && len(typed) > 1 {
			typed = typed[1:]
			flags = append(flags, typed[0])
		}
	}
	out := append(slices.Clone(args[:i]), flags...)
	if slices.ContainsFunc(rest, func(a string) bool { return strings.HasPrefix(a, "-") && a != "-" }) {
		out = append(out, "--")
	}
	return append(out, rest...)
}

// takesValue says whether a flag as it was typed is followed by its value.
func takesValue(c *cli.Command, typed string) bool {
	name := strings.TrimLeft(typed, "-")
	for _, f := range c.Flags {
		if _, isBool := f.(*cli.BoolFlag); !isBool && slices.Contains(f.Names(), name) {
			return true
		}
	}
	return false
}
