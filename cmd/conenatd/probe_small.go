//go:build conenatd_small

package main

import (
	"errors"

	"github.com/spf13/cobra"
)

// probeCommand returns a command that only says where probe is.
func probeCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "probe",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("this is the small build, which has no probe: run the full build's on any inside host")
		},
	}
}
