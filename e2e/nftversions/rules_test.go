package nftversions

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/lab"
)

// A rule is the kernel's list of its expressions, sorted, without registers, because each
// nft chooses others. The listing already shows the order, except for a counter between a
// lookup and the use of its result.
type rule string

var (
	registers = regexp.MustCompile(`\b(dreg|reg|sreg_data|reg_key|addr_min|addr_max|proto_min|proto_max)( reg)? \d+ ?`)
	// Anonymous sets are numbered in the order of their creation.
	anonymous = regexp.MustCompile(`__(set|map)\d+`)
	ruleHead  = regexp.MustCompile(`^(\S+ \S+ \S+) \d+( \d+)* *$`)
	// nft does not show whether a payload write updates a checksum.
	checksum = regexp.MustCompile(` csum_type \d+ csum_off \d+ csum_flags \w+`)
	// For a prefix of whole bytes, nft compares only these bytes.
	prefixed = regexp.MustCompile(`\[ bitwise = \( & 0x((?:ff)+)(?:00)+ \) \^ 0x0+ \]\n\[ cmp (\w+) 0x(\w+) \]`)
	// From 1.1.4 on, nft compares one byte of the result instead of four.
	present = regexp.MustCompile(`(present => \]\n\[ cmp \w+ 0x0[01])0+`)
)

// bytecode returns the kernel's rules of each chain, such as "ip conenat admit". The
// newest nft prints them.
func (n *nft) bytecode(ns *lab.Namespace) (map[string][]rule, error) {
	out, err := n.newest.run(ns, "", "--debug=netlink", "-t", "list", "ruleset")
	if err != nil && !errors.Is(err, errWords) {
		return nil, err
	}
	all := make(map[string][]rule)
	chain := ""
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		switch m := ruleHead.FindStringSubmatch(line); {
		case m != nil:
			chain = m[1]
			all[chain] = append(all[chain], "")
		case chain != "" && strings.HasPrefix(line, "  [ "):
			rules := all[chain]
			line = anonymous.ReplaceAllString(registers.ReplaceAllString(line, ""), "__$1")
			line = checksum.ReplaceAllString(line, "")
			rules[len(rules)-1] += rule(strings.Join(strings.Fields(line), " ") + "\n")
		default:
			chain = ""
		}
	}
	for _, rules := range all {
		for i, r := range rules {
			text := present.ReplaceAllString(string(r), "$1")
			text = prefixed.ReplaceAllStringFunc(text, func(s string) string {
				m := prefixed.FindStringSubmatch(s)
				return "[ cmp " + m[2] + " 0x" + m[3][:len(m[1])] + " ]"
			})
			parts := strings.Split(strings.TrimSpace(text), "\n")
			slices.Sort(parts)
			rules[i] = rule(strings.Join(parts, "\n") + "\n")
		}
	}
	return all, nil
}

var elementTimeout = regexp.MustCompile(` timeout \d+ms`)

// untimed returns the rules without the timeouts of elements that they add: nft 1.0.2
// does not show them, so a copy has the set's default.
func untimed(all map[string][]rule) map[string][]rule {
	some := make(map[string][]rule)
	for chain, rules := range all {
		for _, r := range rules {
			some[chain] = append(some[chain], rule(elementTimeout.ReplaceAllString(string(r), "")))
		}
	}
	return some
}

// count returns how many rules there are.
func count(all map[string][]rule) (n int) {
	for _, rules := range all {
		n += len(rules)
	}
	return n
}

// difference describes the first rule that differs; it is empty if none does.
func difference(before, after map[string][]rule) string {
	for chain, rules := range before {
		if len(rules) != len(after[chain]) {
			return fmt.Sprintf("chain %s: %d rules, then %d", chain, len(rules), len(after[chain]))
		}
		for i, r := range rules {
			if after[chain][i] != r {
				return fmt.Sprintf("chain %s, rule %d:\n%sthen\n%s", chain, i+1, r, after[chain][i])
			}
		}
	}
	if len(before) != len(after) {
		return fmt.Sprintf("%d chains with rules, then %d", len(before), len(after))
	}
	return ""
}

var (
	// ownership matches what a copy must not have: the program name, and the owner and
	// persist flags. nft before 1.1 knows only owner; with that flag alone a table ends
	// when the nft that loads it exits.
	ownership = regexp.MustCompile(`(?m) # progname .*$|^\tflags (owner|persist|owner,persist|owner,0x4)?,?\n`)
	counters  = regexp.MustCompile(`packets \d+ bytes \d+`)
	counted   = regexp.MustCompile(`\t# count \d+`) // of elements, whose number changes
	expiry    = regexp.MustCompile(` expires \w+`)
	elements  = regexp.MustCompile(`(?s)elements = \{(.*?)\}`)
	// Elements that expire within seconds are not worth loading.
	soon = regexp.MustCompile(` expires (\d+ms|[0-4]s(\d+ms)?)\b`)
)

// unowned returns a listing without the marks of ownership.
func unowned(listing string) string { return ownership.ReplaceAllString(listing, "") }

// settled returns a listing without what changes by itself, with the elements sorted.
func settled(listing string) string {
	text := unowned(listing)
	text = counters.ReplaceAllString(text, "packets N bytes N")
	text = expiry.ReplaceAllString(counted.ReplaceAllString(text, ""), "")
	text = elements.ReplaceAllStringFunc(text, func(s string) string {
		all := strings.Split(strings.Join(strings.Fields(elements.FindStringSubmatch(s)[1]), " "), ", ")
		slices.Sort(all)
		// The kernel removes elements that count flows when no flow is left.
		all = slices.DeleteFunc(all, func(e string) bool { return e == "" || strings.Contains(e, " ct count ") })
		if len(all) == 0 {
			return ""
		}
		return "elements = { " + strings.Join(all, ", ") + " }"
	})
	lines := strings.Split(text, "\n")
	return strings.Join(slices.DeleteFunc(lines, func(l string) bool { return strings.TrimSpace(l) == "" }), "\n")
}

// firstDifference shows the first line that differs.
func firstDifference(before, after string) string {
	b, a := strings.Split(before, "\n"), strings.Split(after, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return fmt.Sprintf("%s\nthen\n%s", b[i], a[i])
		}
	}
	return fmt.Sprintf("%d lines, then %d", len(b), len(a))
}

// rulesInJSON counts the rules in a JSON listing; an empty rule is an error.
func rulesInJSON(listing string) (n int, err error) {
	var doc struct {
		NFTables []struct {
			Rule *struct{ Expr []any }
		}
	}
	if err := json.Unmarshal([]byte(listing), &doc); err != nil {
		return 0, err
	}
	for _, o := range doc.NFTables {
		if o.Rule == nil {
			continue
		}
		n++
		if len(o.Rule.Expr) == 0 || slices.Contains(o.Rule.Expr, nil) {
			return n, fmt.Errorf("rule %d is not whole: %v", n, o.Rule.Expr)
		}
	}
	return n, nil
}
