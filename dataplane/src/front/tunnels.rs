//! Tunnels: connections of the host's side that lead to a port of a guest without a forward's listening.
//!
//! They are a forward's connections in all but where they come from: refused to a guest under quarantine, counted
//! for the same limits, half closed on either side.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use crate::descriptors::Descriptors;
use crate::egress::stream::HostStream;
use crate::front::{FrontMessage, FrontReceiver};
use crate::message::{Ingress, Input, Origin, Router, Waiting};
use crate::metrics::{Metrics, TunnelRefusal};

/// Connections that may wait for a guest's driver.
const WAITING_MAX: usize = 256;
/// They may have this part of the descriptors that are kept back.
const WAITING_PART: usize = 4;

/// Why a tunnel was not opened. Its connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoTunnel {
    /// No guest has the address; only guests' are led to.
    #[error("no guest has the address {0}")]
    NoGuest(SocketAddr),
    /// Too many at once.
    #[error("too many tunnels are being opened")]
    Backlog,
}

/// Opens tunnels into one network. Clones share the limit.
#[derive(Clone)]
pub struct Tunnels {
    router: Arc<dyn Router>,
    metrics: Arc<Metrics>,
    waiting: Arc<AtomicUsize>,
    waiting_max: usize,
}

impl Tunnels {
    /// Into the network of this router.
    pub fn new(router: Arc<dyn Router>, metrics: Arc<Metrics>, descriptors: &Descriptors) -> Self {
        Self {
            router,
            metrics,
            waiting: Arc::default(),
            waiting_max: WAITING_MAX.min(descriptors.reserve() / WAITING_PART),
        }
    }

    /// Whether a tunnel opens nothing to anybody: every guest reaches every other.
    pub fn may_pass(&self) -> bool {
        self.router.is_open()
    }

    /// Pipes a connection to a place in the network. `early` was read from it before; the guest gets it first.
    ///
    /// # Errors
    /// [`NoTunnel`], which is counted. What the guest itself refuses later ends the connection.
    pub fn open(&self, stream: HostStream, early: Vec<u8>, target: SocketAddr) -> Result<(), NoTunnel> {
        let refused = |cause, error| {
            self.metrics.tunnel_refusals.of(cause).increment();
            Err(error)
        };
        let no_guest = || refused(TunnelRefusal::NoGuest, NoTunnel::NoGuest(target));
        let Some(vm) = self.router.guest_at(target.ip()).filter(|_| target.port() != 0) else {
            return no_guest();
        };
        let Some(waiting) = Waiting::enter(&self.waiting, self.waiting_max) else {
            return refused(TunnelRefusal::Backlog, NoTunnel::Backlog);
        };
        let ingress = Ingress {
            stream,
            early,
            target,
            client: None,
            origin: Origin::Tunnel,
            waiting,
        };
        // Before the guest could have it. One that was gone in that moment is counted both ways.
        self.metrics.tunnels.increment();
        if !self.router.send(vm, Input::Ingress(ingress)) {
            return no_guest();
        }
        Ok(())
    }

    /// Opens what the front asks for, as long as it can be heard.
    pub async fn serve(self, mut front: FrontReceiver) {
        loop {
            match front.receive().await {
                Ok((FrontMessage::Tunnel { target }, stream)) => {
                    if let Err(error) = self.open(stream, Vec::new(), target) {
                        tracing::debug!(%error, "no tunnel");
                    }
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
