package config

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// A place is a key in a table: table 0 is the top of the file, table n the nth
// [[subnet]]. The empty key is the table's own header.
type place struct {
	table int
	key   string
}

// A position is in a file: its line and its column in characters, both counted from 1.
type position struct{ line, column int }

func (p position) String() string { return fmt.Sprintf("%d:%d", p.line, p.column) }

// A spot is where a key, its value, and the items of the value are. Headers of tables have
// no value.
type spot struct {
	key, value position
	items      []position
}

// positions has the first spot of each key. The decoder keeps one position per name, so it
// cannot tell one [[subnet]] from the next.
type positions map[place]spot

// of returns the spot of a key, otherwise that of its table, otherwise of the first mention
// of subnet.
func (ps positions) of(table int, key string) spot {
	for _, p := range []place{{table, key}, {table, ""}, {0, "subnet"}} {
		if s, ok := ps[p]; ok {
			return s
		}
	}
	return spot{key: position{1, 1}}
}

// findPositions finds the keys of data, which must be valid TOML.
func findPositions(data string) positions {
	s := scanner{data: data, found: make(positions), line: 1, column: 1}
	for s.skip(" \t\r\n"); s.at < len(s.data); s.skip(" \t\r\n") {
		if s.peek() == '[' {
			s.header()
		} else {
			key, x := s.pair(s.table)
			s.noteKey(key, s.subnets, x)
		}
	}
	return s.found
}

// A scanner goes through valid TOML once.
type scanner struct {
	data  string
	at    int // index of the next byte
	found positions

	line, column int // where the byte at counted is, both counted from 1
	counted      int // index up to which lines and characters were counted

	table   toml.Key // that the scanner is in
	subnets int      // [[subnet]] headers so far
}

// position returns where the next byte is. It counts only what it has not counted yet: a
// list on one line may have tens of thousands of items.
func (s *scanner) position() position {
	part := s.data[s.counted:s.at]
	if i := strings.LastIndexByte(part, '\n'); i >= 0 {
		s.line += strings.Count(part, "\n")
		s.column = 1
		part = part[i+1:]
	}
	s.column += utf8.RuneCountInString(part)
	s.counted = s.at
	return position{s.line, s.column}
}

// peek returns the next byte, or 0 at the end.
func (s *scanner) peek() byte {
	if s.at < len(s.data) {
		return s.data[s.at]
	}
	return 0
}

// skip passes bytes of set and comments.
func (s *scanner) skip(set string) {
	for s.at < len(s.data) {
		switch c := s.data[s.at]; {
		case c == '#':
			s.until("\n")
		case strings.IndexByte(set, c) < 0:
			return
		default:
			s.at++
		}
	}
}

// until goes to the next byte of set, or to the end.
func (s *scanner) until(set string) {
	if n := strings.IndexAny(s.data[s.at:], set); n >= 0 {
		s.at += n
		return
	}
	s.at = len(s.data)
}

// note records a spot, unless the place has one.
func (s *scanner) note(p place, x spot) {
	if _, ok := s.found[p]; !ok {
		s.found[p] = x
	}
}

// header passes [table] or [[table]].
func (s *scanner) header() {
	x := spot{key: s.position()}
	s.at++
	many := s.peek() == '['
	s.skip("[")
	s.table = s.key()
	s.skip(" \t]")
	if many && len(s.table) == 1 && s.table[0] == "subnet" {
		s.subnets++
	}
	s.noteKey(s.table, s.subnets, x)
}

// pair passes key = value in a table. It returns the full name of the key.
func (s *scanner) pair(table toml.Key) (key toml.Key, x spot) {
	x.key = s.position()
	key = append(table[:len(table):len(table)], s.key()...)
	s.skip(" \t=")
	x.value = s.position()
	x.items = s.value(key, 0)
	return key, x
}

// noteKey records the spot of a key by its full name.
func (s *scanner) noteKey(key toml.Key, subnets int, x spot) {
	s.note(place{0, key[0]}, x)
	if key[0] == "subnet" {
		s.note(place{subnets, ""}, x)
		if len(key) > 1 {
			s.note(place{subnets, key[1]}, x)
		}
	}
}

// key passes a key and returns its parts.
func (s *scanner) key() (key toml.Key) {
	for {
		s.skip(" \t")
		start := s.at
		if c := s.peek(); c == '"' || c == '\'' {
			s.quoted()
		} else {
			s.until(" \t.=]")
		}
		key = append(key, keyPart(s.data[start:s.at]))
		if s.skip(" \t"); s.peek() != '.' {
			return key
		}
		s.at++
	}
}

// keyPart returns one part of a key without its quotes.
func keyPart(text string) string {
	var v map[string]any
	if !strings.ContainsAny(text, `"'`) {
		return text
	}
	_, _ = toml.Decode(text+"=0", &v) // valid, since the file is
	for key := range v {
		return key
	}
	return text
}

// quoted passes a string of one line or of several.
func (s *scanner) quoted() {
	quote := s.data[s.at : s.at+1]
	end := quote
	if strings.HasPrefix(s.data[s.at:], strings.Repeat(quote, 3)) {
		end = strings.Repeat(quote, 3)
	}
	for s.at += len(end); s.at < len(s.data) && !strings.HasPrefix(s.data[s.at:], end); s.at++ {
		if quote == `"` && s.data[s.at] == '\\' {
			s.at++
		}
	}
	s.at = min(s.at+len(end), len(s.data))
	if len(end) > 1 { // the string may end with two quotes of its own
		for s.peek() == quote[0] {
			s.at++
		}
	}
}

// value passes the value of a key, and returns where its items are if it is an array. If it
// is an item of the array subnet, n is its number, from 1.
func (s *scanner) value(key toml.Key, n int) (items []position) {
	const blank = " \t\r\n,"
	switch s.peek() {
	case '"', '\'':
		s.quoted()
	case '[':
		s.at++
		for s.skip(blank); s.at < len(s.data) && s.peek() != ']'; s.skip(blank) {
			items = append(items, s.position())
			if len(key) == 1 && key[0] == "subnet" {
				n = len(items)
				s.note(place{n, ""}, spot{key: items[n-1], value: items[n-1]})
			}
			s.value(key, n)
		}
		s.at++
	case '{':
		s.at++
		for s.skip(blank); s.at < len(s.data) && s.peek() != '}'; s.skip(blank) {
			if inner, x := s.pair(key); n > 0 {
				s.note(place{n, inner[1]}, x)
			}
		}
		s.at++
	default:
		s.until(",]}#\n\r")
	}
	return items
}

// last returns the table, the full name and the position of the key that the decoder calls
// name, in the table that begins last. The position is zero if it is not there.
func (ps positions) last(name string) (table, full string, at position) {
	table = "the file"
	n := 0
	for p := range ps {
		n = max(n, p.table)
	}
	key, inSubnet := strings.CutPrefix(name, "subnet.")
	if inSubnet {
		table = "a subnet"
	} else {
		n = 0
	}
	return table, name, ps[place{n, key}].key
}
