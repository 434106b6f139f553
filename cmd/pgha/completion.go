package main

import (
	"fmt"

	"github.com/urfave/cli/v2"
)

// The scripts ask pgha itself for the words that fit.
const bashCompletion = `_pgha() {
  local cur words
  cur="${COMP_WORDS[COMP_CWORD]}"
  words=("${COMP_WORDS[@]:0:$COMP_CWORD}")
  [[ "$cur" == -* ]] && words+=("$cur")
  COMPREPLY=($(compgen -W "$("${words[@]}" --generate-bash-completion 2>/dev/null)" -- "$cur"))
}
complete -F _pgha pgha
`

const zshCompletion = `#compdef pgha
_pgha() {
  local -a opts
  local cur=${words[-1]}
  if [[ "$cur" == -* ]]; then
    opts=("${(@f)$(${words[@]:0:#words[@]-1} ${cur} --generate-bash-completion 2>/dev/null)}")
  else
    opts=("${(@f)$(${words[@]:0:#words[@]-1} --generate-bash-completion 2>/dev/null)}")
  fi
  _describe 'values' opts
}
compdef _pgha pgha
`

func completionCommand() *cli.Command {
	return &cli.Command{
		Name: "completion", Usage: "print a completion script: source <(pgha completion bash)", ArgsUsage: "bash|zsh|fish",
		BashComplete: func(*cli.Context) { fmt.Println("bash\nzsh\nfish") },
		Action: func(c *cli.Context) error {
			switch shell := c.Args().First(); shell {
			case "bash":
				fmt.Print(bashCompletion)
			case "zsh":
				fmt.Print(zshCompletion)
			case "fish":
				script, err := c.App.ToFishCompletion()
				if err != nil {
					return fmt.Errorf("make completion script: %w", err)
				}
				fmt.Print(script)
			default:
				return fmt.Errorf("no completion for %q: use bash, zsh or fish", shell)
			}
			return nil
		},
	}
}
