//! What both ends of a flow between two guests share: that it is let through, until either ends it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vnet_proto::model::FlowId;

/// A flow is let through. Both engines look at it with every packet, which costs one read of memory that
/// changes twice in a flow's life; neither waits for the other.
///
/// Whoever closes it tells the other end, once, and only an end that knows of the flow: so no more such
/// messages can be on their way to an engine than it has had flows since it last took them.
#[derive(Debug)]
pub struct Permit {
    flow: FlowId,
    state: AtomicU8,
}

const NEW: u8 = 0;
const ACCEPTED: u8 = 1;
const CLOSED: u8 = 2;

impl Permit {
    /// For a flow that its opener has been allowed.
    pub(super) fn new(flow: FlowId) -> Arc<Self> {
        Arc::new(Self {
            flow,
            state: AtomicU8::new(NEW),
        })
    }

    /// The flow, as the opener's engine numbered it.
    pub(super) fn flow(&self) -> FlowId {
        self.flow
    }

    /// Whether the other end has yet to hear of it.
    pub(super) fn is_new(&self) -> bool {
        self.state.load(Ordering::Acquire) == NEW
    }

    /// Whether packets may pass.
    pub(super) fn is_open(&self) -> bool {
        self.state.load(Ordering::Acquire) != CLOSED
    }

    /// The other end has taken the flow on. False when it was ended meanwhile.
    pub(super) fn accept(&self) -> bool {
        let accepted = self
            .state
            .compare_exchange(NEW, ACCEPTED, Ordering::AcqRel, Ordering::Acquire);
        accepted.is_ok() || accepted == Err(ACCEPTED)
    }

    /// The opener ends it: nothing passes any more. Whether the target is to be told.
    pub(super) fn close_at_opener(&self) -> bool {
        self.state.swap(CLOSED, Ordering::AcqRel) == ACCEPTED
    }

    /// The target ends it, or will not have it: nothing passes any more. Whether the opener is to be told.
    pub(super) fn close_at_target(&self) -> bool {
        self.state.swap(CLOSED, Ordering::AcqRel) != CLOSED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_closes_it_first_tells_the_other_once() {
        let permit = Permit::new(FlowId(7));
        assert!(permit.is_new() && permit.is_open());
        assert!(permit.accept() && permit.accept() && !permit.is_new());
        assert!(permit.close_at_opener());
        assert!(!permit.is_open() && !permit.is_new());
        assert!(!permit.close_at_target() && !permit.close_at_opener());
        assert!(!permit.accept(), "what is over is not taken on");
    }

    #[test]
    fn a_target_that_never_heard_of_it_is_told_nothing_and_one_that_refuses_tells() {
        let unheard = Permit::new(FlowId(7));
        assert!(!unheard.close_at_opener() && !unheard.accept());
        let refused = Permit::new(FlowId(8));
        assert!(refused.close_at_target() && !refused.close_at_opener());
    }
}
