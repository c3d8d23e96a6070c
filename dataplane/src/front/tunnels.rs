//! Tunnels: connections of the host's side that lead to a port of a guest without a forward's listening.
//!
//! They are a forward's connections in all but where they come from: refused to a guest under quarantine, counted
//! for the same limits, half closed on either side.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::admission::{Admission, Gate};
use crate::descriptors::Descriptors;
use crate::egress::stream::HostStream;
use crate::front::{FrontMessage, FrontReceiver};
use crate::message::{Ingress, Origin, Router, Waiting};
use crate::metrics::Metrics;

/// Connections that may wait for a guest's driver.
const WAITING_MAX: usize = 256;
/// They may have this part of the descriptors that are kept back.
const WAITING_PART: usize = 4;

/// Who asks for a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// The front, for those that it serves where no guest can be.
    Front,
    /// Somebody who may be a guest: led on only while every guest reaches every other.
    Anybody,
}

/// The way of one tunnel.
struct Way {
    router: Arc<dyn Router>,
    by: Asker,
}

impl Gate for Way {
    fn pass(&self, hand_over: &mut dyn FnMut()) {
        if self.by == Asker::Front || self.router.is_open() {
            hand_over();
        }
    }
}

/// Opens tunnels into one network. Clones share the limit.
#[derive(Clone)]
pub struct Tunnels {
    router: Arc<dyn Router>,
    metrics: Arc<Metrics>,
    admission: Admission,
}

impl Tunnels {
    /// Into the network of this router.
    pub fn new(router: Arc<dyn Router>, metrics: Arc<Metrics>, descriptors: &Descriptors) -> Self {
        let waiting_max = WAITING_MAX.min(descriptors.reserve() / WAITING_PART);
        Self {
            admission: Admission::new(Arc::clone(&router), Arc::clone(&metrics), waiting_max),
            router,
            metrics,
        }
    }

    /// Whether a tunnel opens nothing to anybody: every guest reaches every other.
    pub fn may_pass(&self) -> bool {
        self.router.is_open()
    }

    /// Pipes a connection to a place in the network. `early` was read from it before; the guest gets it first. Only
    /// guests' addresses are led to; where it is nobody's, or the guest refuses, the connection is closed. Called
    /// where tasks can be spawned. `by`: who asked.
    pub fn open(&self, stream: HostStream, early: Vec<u8>, target: SocketAddr, by: Asker) {
        let ingress = Ingress {
            stream,
            early,
            target,
            client: None,
            origin: Origin::Tunnel,
            waiting: Waiting::default(),
        };
        let router = Arc::clone(&self.router);
        self.admission.admit(ingress, Way { router, by });
    }

    /// Opens what the front asks for, as long as it can be heard.
    pub async fn serve(self, mut front: FrontReceiver) {
        loop {
            match front.receive().await {
                Ok((FrontMessage::Tunnel { target }, stream)) => {
                    self.open(stream, Vec::new(), target, Asker::Front);
                }
                Ok((message, _)) => {
                    self.metrics
                        .front_refusals
                        .of(crate::metrics::FrontRefusal::Malformed)
                        .increment();
                    tracing::warn!(
                        ?message,
                        "a message of the front's channel is not for a dataplane"
                    );
                }
                Err(error) => {
                    tracing::error!(%error, "the front cannot be heard any more; no tunnel is opened for it");
                    return;
                }
            }
        }
    }
}
