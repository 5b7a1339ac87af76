package main

import (
	"flag"
	"fmt"
	"io"
	"strings"
)

const completionHelp = `orgkeys-node completion SHELL prints a script that completes commands and flags.

  bash  orgkeys-node completion bash > /etc/bash_completion.d/orgkeys-node
  zsh   orgkeys-node completion zsh > "${fpath[1]}/_orgkeys-node"
  fish  orgkeys-node completion fish > ~/.config/fish/completions/orgkeys-node.fish
`

var shells = map[string]func() string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}

func completion(words []string, out io.Writer) error {
	switch {
	case len(words) == 0:
		return usageError("completion needs a shell: bash, zsh or fish")
	case len(words) > 1:
		return usageError("%q is one argument too many", words[1])
	}
	script, known := shells[words[0]]
	if !known {
		return usageError("there is no completion for %q%s: bash, zsh and fish have one", words[0], meant(words[0], []string{"bash", "zsh", "fish"}))
	}
	return write(out, script())
}

// flagNames are the flags of a command, as they are typed.
func (c command) flagNames() string {
	return "--" + strings.Join(append(c.flags, "help"), " --")
}

func bashCompletion() string {
	var cases strings.Builder
	for _, c := range commands() {
		fmt.Fprintf(&cases, "\t%s) words='%s' ;;\n", c.name, c.flagNames())
	}
	return `# bash completion for orgkeys-node
_orgkeys_node() {
	local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} words=''
	case $before in
	--*-file | --tls-cert | --tls-key | --tpm | --config) COMPREPLY=($(compgen -f -- "$word")) && return ;;
	--dir) COMPREPLY=($(compgen -d -- "$word")) && return ;;
	esac
	case $COMP_CWORD:${COMP_WORDS[1]} in
	1:*) words='` + strings.Join(commandNames(), " ") + `' ;;
	2:completion) words='bash zsh fish' ;;
	2:help) words='` + strings.Join(commandNames(), " ") + `' ;;
	esac
	[ $COMP_CWORD -eq 1 ] || case ${COMP_WORDS[1]} in
` + cases.String() + `	esac
	COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -F _orgkeys_node orgkeys-node
`
}

func zshCompletion() string {
	var names, cases strings.Builder
	for _, c := range commands() {
		fmt.Fprintf(&names, "\t\t'%s:%s'\n", c.name, strings.ReplaceAll(c.help, ":", ""))
		fmt.Fprintf(&cases, "\t%s) compadd -- %s ;;\n", c.name, c.flagNames())
	}
	return `#compdef orgkeys-node
_orgkeys-node() {
	local -a names
	names=(
` + names.String() + `		'completion:print a script that completes commands and flags'
		'version:print the version'
		'help:about a command'
	)
	if (( CURRENT == 2 )); then
		_describe command names
		return
	fi
	case $words[CURRENT-1] in
	--*-file|--tls-cert|--tls-key|--tpm|--config) _files; return ;;
	--dir) _files -/; return ;;
	esac
	case $words[2] in
` + cases.String() + `	completion) compadd -- bash zsh fish ;;
	help) _describe command names ;;
	esac
}
_orgkeys-node "$@"
`
}

func fishCompletion() string {
	var b strings.Builder
	b.WriteString("# fish completion for orgkeys-node\ncomplete -c orgkeys-node -f\n")
	quoted := func(text string) string { return "'" + strings.ReplaceAll(text, "'", `\\'`) + "'" }
	for _, c := range commands() {
		fmt.Fprintf(&b, "complete -c orgkeys-node -n __fish_use_subcommand -a %s -d %s\n", c.name, quoted(c.help))
	}
	b.WriteString("complete -c orgkeys-node -n __fish_use_subcommand -a 'completion version help'\n")
	b.WriteString("complete -c orgkeys-node -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'\n")
	all := flag.NewFlagSet("", flag.ContinueOnError)
	(&settings{}).flags(all)
	for _, c := range commands() {
		for _, name := range c.flags {
			kind, usage := flag.UnquoteUsage(all.Lookup(name))
			more := ""
			switch kind {
			case "file", "directory", "path":
				more = " -r -F"
			case "":
			default:
				more = " -x"
			}
			fmt.Fprintf(&b, "complete -c orgkeys-node -n '__fish_seen_subcommand_from %s' -l %s%s -d %s\n", c.name, name, more, quoted(usage))
		}
	}
	return b.String()
}
