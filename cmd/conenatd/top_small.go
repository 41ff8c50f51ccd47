//go:build conenatd_small

package main

import (
	"errors"

	"github.com/spf13/cobra"
)

// topCommand returns a command that only says what to use instead of top.
func topCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "top",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return errors.New(`this is the small build, which has no top: use "conenatd list" or "conenatd watch"`)
		},
	}
}
