package config

import "strings"

// Nearest returns the one of names of flags that text was probably meant to be, or "".
func Nearest(text string, flags []string) string {
	words := make([]string, len(flags))
	for i, f := range flags {
		words[i] = strings.ReplaceAll(f, "-", "_")
	}
	return strings.ReplaceAll(nearest(text, words), "_", "-")
}

// nearest returns the one of words that text was probably meant to be, or "". A dash counts
// as an underscore and a capital as a small letter.
func nearest(text string, words []string) string {
	if len(text) > 64 {
		return "" // not a slip of the finger
	}
	text = strings.ToLower(strings.ReplaceAll(text, "-", "_"))
	best, least := "", max(1, len(text)/3)+1
	for _, w := range words {
		if d := distance(text, w); d < least && w != "" && d < len(w) {
			best, least = w, d
		}
	}
	return best
}

// distance is the number of bytes to insert, remove, replace or swap with the next one that
// make a into b (the optimal string alignment distance).
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
