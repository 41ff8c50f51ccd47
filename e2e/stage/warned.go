package stage

import (
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
)

// Warned reports whether a status has a warning that contains text.
func Warned(st control.Status, text string) bool {
	return slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, text) })
}
