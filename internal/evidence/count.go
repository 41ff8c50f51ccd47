package evidence

// A Count is what a counter of the tables counted since it was first read. It
// goes on when a new table starts the counter at zero again.
type Count struct {
	counting    bool
	Total, last uint64
}

// Read takes n, the present value of the counter, and returns the total.
func (t *Count) Read(n uint64) uint64 {
	switch {
	case !t.counting:
		t.counting = true
	case n < t.last:
		t.Total += n
	default:
		t.Total += n - t.last
	}
	t.last = n
	return t.Total
}
