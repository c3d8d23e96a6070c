//! How a connection of the host's side is let in to a guest, whether it came to a forward or through a tunnel.
//!
//! The guest that has the target's address is looked up for each connection. Where none has it but one might, as with
//! an address that was set by hand in a guest which only serves and never spoke, guests are asked by ARP (RFC 826) and
//! the connection waits for the answer, as in any network.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crate::message::{Ingress, Input, Origin, Router, Waiting};
use crate::metrics::{ForwardRefusal, Metrics, TunnelRefusal};

/// How often guests are asked whose an address is.
const QUESTIONS: u32 = 3;
/// How long an answer to one question is waited for.
const QUESTION_PATIENCE: Duration = Duration::from_millis(320);
/// How long between looks for the answer.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Lets connections in to the guests of one network. Clones share the limit.
#[derive(Clone)]
pub(crate) struct Admission {
    router: Arc<dyn Router>,
    metrics: Arc<Metrics>,
    waiting: Arc<AtomicUsize>,
    waiting_max: usize,
}

/// Why one is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("no guest has the address")]
    NoGuest,
    #[error("too many wait to be let in")]
    Backlog,
}

impl Admission {
    /// To the guests of this router. So many connections may wait, for an answer or for a guest's driver.
    pub(crate) fn new(router: Arc<dyn Router>, metrics: Arc<Metrics>, waiting_max: usize) -> Self {
        Self {
            router,
            metrics,
            waiting: Arc::default(),
            waiting_max,
        }
    }

    /// Hands a connection to the guest at its target, now or soon, or refuses it: that is counted, and the connection
    /// closed. Called where tasks can be spawned. Its `waiting` is set here.
    pub(crate) fn admit(&self, mut ingress: Ingress) {
        let Some(waiting) = Waiting::enter(&self.waiting, self.waiting_max) else {
            return self.refuse(&ingress, Refusal::Backlog);
        };
        ingress.waiting = waiting;
        let target = ingress.target;
        if target.port() == 0 {
            self.refuse(&ingress, Refusal::NoGuest);
        } else if let Some(vm) = self.router.guest_at(target.ip()) {
            self.hand_over(vm, ingress);
        } else if self.router.seek(target.ip()) {
            tokio::spawn(self.clone().seek(ingress));
        } else {
            self.refuse(&ingress, Refusal::NoGuest);
        }
    }

    /// Waits for the answer to the question that was asked, and asks again.
    async fn seek(self, ingress: Ingress) {
        let address = ingress.target.ip();
        for question in 1..=QUESTIONS {
            for _ in 0..QUESTION_PATIENCE.as_millis() / LOOK_EVERY.as_millis() {
                tokio::time::sleep(LOOK_EVERY).await;
                if let Some(vm) = self.router.guest_at(address) {
                    return self.hand_over(vm, ingress);
                }
            }
            if question == QUESTIONS || !self.router.seek(address) {
                break;
            }
        }
        self.refuse(&ingress, Refusal::NoGuest);
    }

    fn hand_over(&self, vm: vnet_proto::model::VmId, ingress: Ingress) {
        // Before the guest could have it. One that was gone in that moment is counted both ways.
        match ingress.origin {
            Origin::Forward(_) => self.metrics.forward_connections.increment(),
            Origin::Tunnel => self.metrics.tunnels.increment(),
        }
        let origin = ingress.origin;
        if !self.router.send(vm, Input::Ingress(ingress)) {
            self.count(origin, Refusal::NoGuest);
        }
    }

    fn refuse(&self, ingress: &Ingress, why: Refusal) {
        tracing::debug!(target_address = %ingress.target, reason = %why, "a connection is not let in");
        self.count(ingress.origin, why);
        // Who connected to a port learns that nobody serves there; in a tunnel, an end is all that is said.
        if matches!(ingress.origin, Origin::Forward(_)) {
            ingress.stream.set_reset();
        }
    }

    fn count(&self, origin: Origin, why: Refusal) {
        match (origin, why) {
            (Origin::Forward(_), Refusal::NoGuest) => {
                self.metrics
                    .forward_refusals
                    .of(ForwardRefusal::NoGuest)
                    .increment();
            }
            (Origin::Forward(_), Refusal::Backlog) => {
                self.metrics
                    .forward_refusals
                    .of(ForwardRefusal::Backlog)
                    .increment();
            }
            (Origin::Tunnel, Refusal::NoGuest) => {
                self.metrics
                    .tunnel_refusals
                    .of(TunnelRefusal::NoGuest)
                    .increment();
            }
            (Origin::Tunnel, Refusal::Backlog) => {
                self.metrics
                    .tunnel_refusals
                    .of(TunnelRefusal::Backlog)
                    .increment();
            }
        }
    }
}
