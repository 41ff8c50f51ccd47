// Package text lays out text for terminals.
package text

import "strings"

// Wrap breaks a text into lines of at most 80 characters, if its words allow. Each line begins
// with indent and ends with a line end.
func Wrap(text, indent string) string { return WrapAt(80, text, indent) }

// WrapAt is Wrap for lines of another width.
func WrapAt(width int, text, indent string) string {
	var b strings.Builder
	line := indent
	for word := range strings.FieldsSeq(text) {
		if len(line)+1+len(word) > width && line != indent {
			b.WriteString(line + "\n")
			line = indent
		}
		if line != indent {
			line += " "
		}
		line += word
	}
	return b.String() + line + "\n"
}
