package host

import (
	"net/netip"
	"testing"
)

func TestNetworkOf(t *testing.T) {
	got, err := NetworkOf(netip.MustParseAddr("127.0.0.1"))
	if err != nil || got != netip.MustParsePrefix("127.0.0.0/8") {
		t.Fatalf("got %v, %v; want 127.0.0.0/8", got, err)
	}
	if _, err := NetworkOf(netip.MustParseAddr("192.0.2.77")); err == nil {
		t.Fatal("no error for an address that is not on this host")
	}
}
