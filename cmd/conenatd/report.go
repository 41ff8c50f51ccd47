package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// An exitStatus ends the program without a message.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// A report says what was found, and gives the exit status.
type report interface {
	Write(w io.Writer, colored bool) error
	Status() int
}

// writeReport prints a report and returns its exit status as an error, unless that is 0.
func writeReport(c *cobra.Command, r report, asJSON bool) error {
	var err error
	if asJSON {
		err = writeJSON(c, r)
	} else {
		err = r.Write(c.OutOrStdout(), colored())
	}
	if status := r.Status(); err == nil && status > 0 {
		err = exitStatus(status)
	}
	return err
}

// writeJSON prints what v holds as JSON with a line for each value.
func writeJSON(c *cobra.Command, v any) error {
	enc := json.NewEncoder(c.OutOrStdout())
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false) // lines for a shell have & and >
	return enc.Encode(v)
}
