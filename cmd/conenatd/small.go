//go:build conenatd_small

package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func probeCommand() *cobra.Command {
	return leftOut("probe", "run the full build's on any inside host")
}

func topCommand() *cobra.Command {
	return leftOut("top", `use "conenatd list" or "conenatd watch"`)
}

// leftOut returns a command that only says what to use instead.
func leftOut(name, instead string) *cobra.Command {
	return &cobra.Command{
		Use:                name,
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("this is the small build, which has no " + name + ": " + instead)
		},
	}
}
