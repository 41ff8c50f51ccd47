package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
)

// exactly accepts arguments with these names. If the last one ends in dots, there may be more of it.
func exactly(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		n := len(names)
		more := n > 0 && strings.HasSuffix(names[n-1], "...") && len(args) > n
		switch {
		case len(args) == n || more:
			return nil
		case n == 0:
			return fmt.Errorf("%s: expected no argument, got %q", c.Name(), args[0])
		}
		return fmt.Errorf("%s: expected %s, got %s", c.Name(), strings.Join(names, " "), control.Several(len(args), "argument"))
	}
}

// flagError says of a flag that is wrong which command it was for, and which flag may be meant.
func flagError(c *cobra.Command, err error) error {
	unknown, value := new(pflag.NotExistError), new(pflag.InvalidValueError)
	switch {
	case errors.As(err, &value):
		return fmt.Errorf("--%s: %w", value.GetFlag().Name, value.Unwrap())
	case !errors.As(err, &unknown):
		return fmt.Errorf("%s: %w", c.Name(), err)
	}
	var names []string
	c.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	if near := config.Nearest(unknown.GetSpecifiedName(), names); near != "" {
		return fmt.Errorf("%s: %w; did you mean --%s?", c.Name(), err, near)
	}
	return fmt.Errorf(`%s: %w; "conenatd %s --help" lists all`, c.Name(), err, c.Name())
}

// unknownCommand adds to the error of cobra's about a command that is not there which one may be meant.
func unknownCommand(root *cobra.Command, err error) error {
	var name string
	if err == nil {
		return nil
	}
	if _, other := fmt.Sscanf(err.Error(), "unknown command %q for", &name); other != nil {
		return err
	}
	var names []string
	for _, c := range root.Commands() {
		names = append(names, c.Name())
	}
	if near := config.Nearest(name, names); near != "" {
		return fmt.Errorf("%w; did you mean %q?", err, near)
	}
	return fmt.Errorf(`%w; "conenatd --help" lists all`, err)
}

// refuseUnknownTopics lets "help" and "completion" refuse a word that they do not know, in place of
// printing something else.
func refuseUnknownTopics(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			c.Args = func(_ *cobra.Command, args []string) error {
				_, _, err := root.Find(args)
				return unknownCommand(root, err)
			}
		case "completion":
			c.Args = cobra.ArbitraryArgs
			c.RunE = func(c *cobra.Command, args []string) error {
				if len(args) == 0 {
					return c.Help()
				}
				return &config.UsageError{Err: fmt.Errorf("completion: expected bash, zsh or fish, got %q", args[0])}
			}
		}
	}
}

// An output remembers the first error of writing, for commands that print without looking.
type output struct {
	io.Writer
	err error
}

func (o *output) Write(b []byte) (int, error) {
	n, err := o.Writer.Write(b)
	o.err = cmp.Or(o.err, err)
	return n, err
}
