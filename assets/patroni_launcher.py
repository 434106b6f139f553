"""Starts Patroni with a safe way to keep the leader key.

Patroni before 3.0.3 renews a lost leadership by writing the leader key without
a comparison: after a pause longer than its ttl (a frozen or cut-off host), an
old primary overwrites the key of the primary that was promoted meanwhile, both
write on, and acknowledged commits are lost. This program replaces the one
method at fault by a compare-and-swap, proves that the replacement works, and
only then hands over to Patroni. If anything is not as expected it refuses.
"""
import sys
import time

FIXED_IN = (3, 0, 3)


def refuse(reason):
    sys.stderr.write('pgha: refusing to start an unsafe Patroni: %s\n' % reason)
    sys.exit(70)


def version_of(text):
    try:
        return tuple(int(part) for part in text.split('.')[:3])
    except ValueError:
        refuse('cannot read its version %r' % text)


def patched_update_leader(etcd3):
    dcs = sys.modules['patroni.dcs']

    @dcs.catch_return_false_exception
    def _update_leader(self):
        retry = self._retry.copy()

        def _retry(*args, **kwargs):
            kwargs['retry'] = retry
            return retry(*args, **kwargs)

        self._run_and_handle_exceptions(self._do_refresh_lease, True, retry=_retry)
        if not self._lease:
            return False

        cluster = self.cluster
        leader = cluster and cluster.leader
        if isinstance(leader, etcd3.Leader) and leader.name == self._name and leader.session == self._lease:
            return True

        retry.deadline = retry.stoptime - time.time()
        if retry.deadline < 1:
            raise etcd3.Etcd3Error('update_leader timeout')
        # The lease is a new one, or what we know is out of date. The key is moved
        # to our lease only if it still names us. A key that is gone is not made
        # again: others may have led meanwhile, so this node has to win the race
        # like anybody else.
        key = etcd3.base64_encode(self.leader_path)
        name = etcd3.base64_encode(self._name)
        compare = {'key': key, 'target': 'VALUE', 'result': 'EQUAL', 'value': name}
        put = {'request_put': {'key': key, 'value': name, 'lease': self._lease}}
        return bool(self._run_and_handle_exceptions(self._client.txn, compare, put, retry=_retry))

    return _update_leader


class StubRetry(object):
    deadline, stoptime = 10, float('inf')

    def copy(self):
        return self

    def __call__(self, func, *args, **kwargs):
        kwargs.pop('retry', None)
        return func(*args, **kwargs)


class StubClient(object):
    """An etcd in which the leader key names `owner`."""

    def __init__(self, owner):
        self.owner, self.written = owner, []

    def put(self, *args, **kwargs):
        self.written.append(args)
        return True

    def txn(self, compare, success, retry=None):
        if compare.get('target') != 'VALUE' or compare.get('value') != self.owner:
            return False
        self.written.append(success)
        return True


def prove(etcd3):
    """Runs the method in use against an etcd where somebody else leads, and
    against one where this node does."""
    for owner, keeps in (('n2', False), ('n1', True)):
        client = StubClient(etcd3.base64_encode(owner))

        class Stub(object):
            _name, _lease, cluster = 'n1', 'new lease', None
            leader_path, _retry, _client = '/leader', StubRetry(), client

            def _do_refresh_lease(self, force=False, retry=None):
                return True

            def _run_and_handle_exceptions(self, method, *args, **kwargs):
                kwargs.pop('retry', None)
                return method(*args, **kwargs)

        if bool(etcd3.Etcd3._update_leader(Stub())) is not keeps or bool(client.written) is not keeps:
            refuse('the leader key of %s would be %s by n1' % (owner, 'lost' if keeps else 'overwritten'))


def main():
    from patroni.version import __version__
    if version_of(__version__) < FIXED_IN:
        from patroni.dcs import etcd3
        try:
            etcd3.Etcd3._update_leader = patched_update_leader(etcd3)
            prove(etcd3)
        except Exception as e:
            refuse('Patroni %s is not as expected: %r' % (__version__, e))
    from patroni.__main__ import main as patroni_main
    sys.argv[0] = 'patroni'
    return patroni_main()


if __name__ == '__main__':
    sys.exit(main())
