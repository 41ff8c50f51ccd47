package daemon

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/handover"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// A kernel that lacks one backend is no obstacle, unless just that one is asked
// for.
func TestOneMissingBackendIsOneSentence(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	missing := &rules.UnsupportedError{Feature: rules.FeatureMap, Fix: "load the module nft_nat"}
	for _, tt := range []struct {
		backend config.Backend
		want    string // what status says
		err     error
	}{
		{config.BackendAuto, "the nft backend is missing: map of permissions not supported: load the module nft_nat", nil},
		{config.BackendExpect, "", nil},
		{config.BackendNFT, "", missing},
	} {
		t.Run(string(tt.backend), func(t *testing.T) {
			cfg := config.Default()
			cfg.Backend = tt.backend
			r := &reconciler{shared: &shared{}, firewall: &firewall{features: noFeatures(missing)}}
			r.conntrack = handover.Sysctls{Dir: handover.Dir, Notes: handover.Notes{Path: filepath.Join(t.TempDir(), "c.")}}
			err := l.Gateway.Do(func() (err error) {
				if r.reads, err = ctwatch.DialQueries(ctwatch.Config{}); err != nil {
					return err
				}
				defer r.reads.Close()
				o, err := r.open(cfg)
				if o.missing != tt.want {
					t.Errorf("status says %q, want %q", o.missing, tt.want)
				}
				if (o.expect != nil) != (tt.err == nil) {
					t.Errorf("expectations: %v", o.expect)
				}
				return errors.Join(err, closeExpect(o.expect))
			})
			if !errors.Is(err, tt.err) {
				t.Errorf("error %v, want %v", err, tt.err)
			}
		})
	}
}
