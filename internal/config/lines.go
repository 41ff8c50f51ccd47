package config

import (
	"regexp"
	"strings"

	"github.com/BurntSushi/toml"
)

// A place is a key in a table: table 0 is the top of the file, table n the nth
// [[subnet]]. The empty key is the table's own header.
type place struct {
	table int
	key   string
}

// lines has the line, counted from 1, on which a key begins. The decoder keeps one position
// per name, so it cannot tell one [[subnet]] from the next.
type lines map[place]int

// of returns the line of a key, otherwise of its table, otherwise of the first mention of
// subnet (an array of inline tables is one statement).
func (l lines) of(table int, key string) int {
	for _, p := range []place{{table, key}, {table, ""}, {0, "subnet"}} {
		if line, ok := l[p]; ok {
			return line
		}
	}
	return 1
}

// token matches everything that can contain or hide the end of a statement: strings (those
// of several lines first), comments, brackets, line ends.
var token = regexp.MustCompile(`(?s)"""(?:[^\\]|\\.)*?"{3,5}|'''.*?'{3,5}|"(?:[^"\\]|\\.)*"|'[^']*'|#[^\n]*|[\[\]{}]|\n`)

// statements splits data, which must be valid TOML, after each line end that is neither in
// a string nor within brackets.
func statements(data string) []string {
	var all []string
	start, depth := 0, 0
	for _, m := range token.FindAllStringIndex(data, -1) {
		switch data[m[0]] {
		case '[', '{':
			depth++
		case ']', '}':
			depth--
		case '\n':
			if depth == 0 {
				all = append(all, data[start:m[1]])
				start = m[1]
			}
		}
	}
	return append(all, data[start:])
}

// findLines finds the keys of data, which must be valid TOML. It passes each statement to
// the decoder on its own.
func findLines(data string) lines {
	found := make(lines)
	var (
		table   toml.Key // the table that the statement is in
		subnets int      // [[subnet]] headers so far
		line    = 1      // of the statement
	)
	note := func(table int, key string) {
		if _, ok := found[place{table, key}]; !ok {
			found[place{table, key}] = line
		}
	}
	for _, statement := range statements(data) {
		var v map[string]any
		md, _ := toml.Decode(statement, &v) // valid, since data is
		header := strings.HasPrefix(strings.TrimSpace(statement), "[")
		if header {
			table = nil
			if _, ok := v["subnet"].([]map[string]any); ok {
				subnets++
			}
		}
		for _, key := range md.Keys() {
			key = append(table[:len(table):len(table)], key...)
			note(0, key[0])
			if key[0] == "subnet" {
				note(subnets, "")
				if len(key) > 1 {
					note(subnets, key[1])
				}
			}
			if header {
				table = key
			}
		}
		line += strings.Count(statement, "\n")
	}
	return found
}
