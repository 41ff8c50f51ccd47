package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"

	"golang.org/x/sys/unix"
)

// ErrNotRunning says that nobody listens on the control socket.
var ErrNotRunning = errors.New("no conenatd runs in this network namespace")

// A Client sends requests to the daemon. Its methods may be called from any goroutine. Each
// call uses its own connection, so there is nothing to close.
type Client struct {
	path string
	http http.Client
}

// Dial returns a client for the control socket at path. It does not connect: the first
// request shows whether somebody listens.
func Dial(path string) *Client {
	return &Client{path, http.Client{Transport: &http.Transport{
		DisableKeepAlives:     true,
		ResponseHeaderTimeout: answerTime,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// Status returns the daemon's status. The error is ErrNotRunning if there is
// no daemon.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return fetch[Status](ctx, c, http.MethodGet, pathStatus)
}

// Verify makes the daemon compare its state with the kernel's.
func (c *Client) Verify(ctx context.Context) (Verification, error) {
	answer, err := fetch[struct {
		Verification
		failure
	}](ctx, c, http.MethodGet, pathVerify)
	if err == nil && answer.Error != "" {
		err = answer.fault()
	}
	return answer.Verification, err
}

// Permissions calls f for each permission as it arrives, until f returns an error, which
// Permissions returns unchanged. Any other error means that the list is not complete; it is
// ErrNotRunning if there is no daemon.
func (c *Client) Permissions(ctx context.Context, f func(Permission) error) error {
	body, err := c.ask(ctx, http.MethodGet, pathPermissions)
	if err != nil {
		return err
	}
	defer body.Close()
	for in := json.NewDecoder(body); ; {
		var line struct {
			Permission
			failure
		}
		switch err := in.Decode(&line); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read permissions: %w", err)
		case line.Error != "":
			return line.fault()
		}
		if err := f(line.Permission); err != nil {
			return err
		}
	}
}

// Explain asks what becomes of a packet; see Source.Explain.
func (c *Client) Explain(ctx context.Context, peer, ext netip.AddrPort) (Explanation, error) {
	from := peer.String()
	if peer.Port() == 0 {
		from = peer.Addr().String()
	}
	return fetch[Explanation](ctx, c, http.MethodGet, pathExplain+"?"+url.Values{peerParameter: {from}, extParameter: {ext.String()}}.Encode())
}

// Reload makes the daemon read its configuration again. After an error the old
// configuration stays in force.
func (c *Client) Reload(ctx context.Context) error {
	_, err := fetch[struct{}](ctx, c, http.MethodPost, pathReload)
	return err
}

// Revoke ends the permissions that match all words; see Source.Revoke.
func (c *Client) Revoke(ctx context.Context, words []Word) (int, error) {
	query := url.Values{}
	for _, w := range words {
		query.Add(wordParameter, w.String())
	}
	r, err := fetch[result](ctx, c, http.MethodPost, pathRevoke+"?"+query.Encode())
	return r.Revoked, err
}

// Flush ends all permissions.
func (c *Client) Flush(ctx context.Context) (int, error) {
	r, err := fetch[result](ctx, c, http.MethodPost, pathFlush)
	return r.Revoked, err
}

// fetch returns a successful answer that is one value.
func fetch[T any](ctx context.Context, c *Client, method, path string) (v T, err error) {
	body, err := c.ask(ctx, method, path)
	if err != nil {
		return v, err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(&v); err != nil {
		return v, fmt.Errorf("read answer: %w", err)
	}
	return v, nil
}

// ask returns the body of a successful answer. The caller must close it.
func (c *Client) ask(ctx context.Context, method, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://conenatd"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	var f failure
	if err := json.NewDecoder(resp.Body).Decode(&f); err != nil {
		f.Error = resp.Status
	}
	return nil, f.fault()
}

// explain adds to the error what the user can do about it.
func (c *Client) explain(err error) error {
	if wrap := (*url.Error)(nil); errors.As(err, &wrap) {
		err = wrap.Err // the URL means nothing to the user
	}
	var late net.Error
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf(`%w (no answer on %s): start it with "conenatd run"`, ErrNotRunning, c.path)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("ask conenatd: %w: run as root, or as a member of the group of %s", err, c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("ask conenatd: %w: run as root", err)
	case errors.As(err, &late) && late.Timeout():
		return fmt.Errorf("ask conenatd: no answer on %s within %v: it is stopped, too busy or has no descriptor left; its log may say more", c.path, answerTime)
	}
	return fmt.Errorf("ask conenatd: %w", err)
}
