package embedded

import (
	"context"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// interceptor stands before etcd's gRPC server (the HTTP gateway goes through it too).
// It ends all streams when the member stops, and on a learner answers what
// etcd's own interceptors, which come after it, would refuse.
type interceptor struct {
	ctx   context.Context // ends when the member stops
	close context.CancelFunc
	es    atomic.Pointer[etcdserver.EtcdServer]
}

func newInterceptor() *interceptor {
	ctx, cancel := context.WithCancel(context.Background())
	return &interceptor{ctx: ctx, close: cancel}
}

func (g *interceptor) open(es *etcdserver.EtcdServer) { g.es.Store(es) }

// options uses the plain, not the chained, interceptors: they run first.
func (g *interceptor) options() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.UnaryInterceptor(g.unary), grpc.StreamInterceptor(g.stream)}
}

var errStopping = status.Error(codes.Unavailable, ErrStopped.Error())

func (g *interceptor) learner() bool {
	es := g.es.Load()
	return es != nil && es.IsMemberExist(es.MemberID()) && es.IsLearner()
}

func (g *interceptor) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if g.ctx.Err() != nil {
		return nil, errStopping
	}
	if !g.learner() {
		return handler(ctx, req)
	}
	switch r := req.(type) {
	case *pb.RangeRequest:
		return info.Server.(pb.KVServer).Range(ctx, r)
	case *pb.PutRequest:
		return info.Server.(pb.KVServer).Put(ctx, r)
	case *pb.DeleteRangeRequest:
		return info.Server.(pb.KVServer).DeleteRange(ctx, r)
	case *pb.TxnRequest:
		return info.Server.(pb.KVServer).Txn(ctx, r)
	case *pb.LeaseGrantRequest:
		return info.Server.(pb.LeaseServer).LeaseGrant(ctx, r)
	case *pb.LeaseRevokeRequest:
		return info.Server.(pb.LeaseServer).LeaseRevoke(ctx, r)
	case *pb.LeaseTimeToLiveRequest:
		return info.Server.(pb.LeaseServer).LeaseTimeToLive(ctx, r)
	case *pb.MemberListRequest:
		return info.Server.(pb.ClusterServer).MemberList(ctx, r)
	default:
		return handler(ctx, req)
	}
}

func (g *interceptor) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if g.ctx.Err() != nil {
		return errStopping
	}
	ctx, cancel := context.WithCancel(ss.Context())
	defer cancel()
	defer context.AfterFunc(g.ctx, cancel)()
	ss = &boundStream{ServerStream: ss, ctx: ctx}
	if g.learner() {
		switch info.FullMethod {
		case pb.Watch_Watch_FullMethodName:
			return srv.(pb.WatchServer).Watch(&grpc.GenericServerStream[pb.WatchRequest, pb.WatchResponse]{ServerStream: ss})
		case pb.Lease_LeaseKeepAlive_FullMethodName:
			return srv.(pb.LeaseServer).LeaseKeepAlive(
				&grpc.GenericServerStream[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]{ServerStream: ss})
		}
	}
	return handler(srv, ss)
}

// boundStream is a stream whose context also ends with the member.
type boundStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (b *boundStream) Context() context.Context { return b.ctx }
