// Package cone is the model of conenatd: conntrack flows go in, an ordered
// list of grants and revokes comes out.
//
// It decides which peer may send to which mapping, why, and until when. It is
// the one place that knows why a permission stands.
//
// The package is pure. It does no I/O, starts no goroutine and has no clock of
// its own: every call that needs the time takes it. The same inputs give the
// same outputs. It imports no other package of this project; ctwatch and the
// backends share its words (Endpoint, Flow, Permission).
package cone
