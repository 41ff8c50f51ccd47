package userrules

import "errors"

// FailToRead makes the reading of all chains of a table fail from now on, or succeed again.
func FailToRead(r *Reader, table string, fails bool) {
	r.fail = func(title, _ string) error {
		if fails && title == table {
			return errors.New("an expression that nobody knows")
		}
		return nil
	}
}
