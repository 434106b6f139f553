package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

// mistake begins the lines that tell, on top of the text, what was wrong with it.
const mistake = "# MISTAKE: "

// editConfig has the operator edit all settings until they are right.
func editConfig(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	local := node.NewLocal(node.DefaultPaths())
	doc, err := local.ConfigDocument(c.Context)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp("", "pgha-settings-*.yml")
	if err != nil {
		return fmt.Errorf("make a file to edit: %w", err)
	}
	path := f.Name()
	if err := f.Close(); err != nil {
		return fmt.Errorf("make a file to edit: %w", err)
	}
	req := node.ConfigRequest{Rev: doc.Rev}
	err = editAndChange(c, local, path, doc.Text, &req)
	if err == nil || errors.Is(err, errDeclined) && req.Document == "" {
		return errors.Join(err, os.Remove(path))
	}
	return fmt.Errorf("%w (what you wrote is in %s)", err, path)
}

func editAndChange(c *cli.Context, local *node.Local, path, text string, req *node.ConfigRequest) error {
	p, err := editUntilRight(c, local, path, text, req)
	if err != nil {
		return err
	}
	if len(p.Diff) == 0 {
		fmt.Fprintln(os.Stderr, "Nothing was changed.")
		return printNoChange(c, p)
	}
	printPlan(os.Stderr, p)
	if err := confirm(c.Bool("yes"), "Make these changes?"); err != nil {
		return err
	}
	return changeConfig(c, *req)
}

// editUntilRight opens the editor again, with the mistake on top, until the text is
// right or is left as it was opened. The request takes the text.
func editUntilRight(c *cli.Context, local *node.Local, path, text string, req *node.ConfigRequest) (node.ConfigPlan, error) {
	for {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return node.ConfigPlan{}, fmt.Errorf("write the file to edit: %w", err)
		}
		if err := runEditor(c, path); err != nil {
			return node.ConfigPlan{}, err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return node.ConfigPlan{}, fmt.Errorf("read the edited file: %w", err)
		}
		again := strings.HasPrefix(text, mistake)
		if string(data) == text {
			if again {
				return node.ConfigPlan{}, fmt.Errorf("the mistake was left as it is: %w", errDeclined)
			}
			return node.ConfigPlan{Rev: req.Rev, Diff: []node.ConfigDiff{}}, nil
		}
		edited := withoutMistake(string(data))
		if strings.TrimSpace(edited) == "" {
			return node.ConfigPlan{}, fmt.Errorf("the text is empty: %w", errDeclined)
		}
		req.Document = edited
		p, err := local.PlanConfig(c.Context, *req)
		if err == nil {
			return p, nil
		}
		fmt.Fprintln(os.Stderr, "pgha: "+err.Error())
		text = mistake + strings.ReplaceAll(err.Error(), "\n", " ") + "\n" + edited
	}
}

func withoutMistake(text string) string {
	var b strings.Builder
	s := bufio.NewScanner(strings.NewReader(text))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if !strings.HasPrefix(s.Text(), mistake) {
			b.WriteString(s.Text() + "\n")
		}
	}
	return b.String()
}

// runEditor opens the operator's editor. Through the shell, as others do: EDITOR
// may hold options.
func runEditor(c *cli.Context, path string) error {
	editor := cmp.Or(os.Getenv("VISUAL"), os.Getenv("EDITOR"))
	if editor == "" {
		editor = "sensible-editor"
		if _, err := exec.LookPath(editor); err != nil {
			editor = "vi"
		}
	}
	cmd := exec.CommandContext(c.Context, "/bin/sh", "-c", editor+` "$1"`, "sh", path)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("run the editor %s: %w", editor, err)
	}
	return nil
}
