//! Accepts what comes to a forward, and hands each connection to the guest that has the target's address now.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};

use crate::admission::{Admission, Gate};
use crate::egress::stream::HostStream;
use crate::message::{ForwardId, Ingress, Origin, Waiting};
use crate::metrics::{ForwardRefusal, Metrics};

/// How long accepting pauses when the host has no descriptor left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// A listener that the task shares with the forward, which closes it by taking it out.
pub(super) type Shared = Arc<Mutex<Option<StreamListener>>>;

pub(super) enum StreamListener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A stream, and the address that it came from, if it has one.
type Accepted = (HostStream, Option<SocketAddr>);

pub(super) struct Accepting {
    pub(super) forward: ForwardId,
    pub(super) socket: Shared,
    pub(super) admission: Admission,
    pub(super) metrics: Arc<Metrics>,
    pub(super) target: SocketAddr,
    pub(super) keep_client: bool,
}

/// Open as long as its listener is there. Who closes the forward takes that out before guests are told.
struct Listening(Shared);

impl Gate for Listening {
    fn pass(&self, hand_over: &mut dyn FnMut()) {
        let listener = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if listener.is_some() {
            hand_over();
        }
    }
}

impl StreamListener {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        match self {
            Self::Tcp(listener) => listener.poll_accept(context).map(|accepted| {
                let (stream, client) = accepted?;
                Ok((stream.into_std()?.into(), Some(client)))
            }),
            Self::Unix(listener) => listener.poll_accept(context).map(|accepted| {
                let (stream, _) = accepted?;
                Ok((stream.into_std()?.into(), None))
            }),
        }
    }
}

impl Accepting {
    pub(super) async fn run(self) {
        while let Some(accepted) = self.accept().await {
            match accepted {
                Ok((stream, client)) => self.admit(stream, client),
                Err(error) if is_about_one_connection(&error) => {}
                Err(error) => {
                    self.metrics
                        .forward_refusals
                        .of(ForwardRefusal::Accept)
                        .increment();
                    tracing::debug!(%error, target = %self.target, "a forward cannot accept");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    /// The next connection; `None` once the forward is closed.
    async fn accept(&self) -> Option<io::Result<Accepted>> {
        std::future::poll_fn(
            |context| match &*self.socket.lock().unwrap_or_else(PoisonError::into_inner) {
                None => Poll::Ready(None),
                Some(listener) => listener.poll_accept(context).map(Some),
            },
        )
        .await
    }

    fn admit(&self, stream: HostStream, client: Option<SocketAddr>) {
        let ingress = Ingress {
            stream,
            early: Vec::new(),
            target: self.target,
            client: client.filter(|_| self.keep_client),
            origin: Origin::Forward(self.forward),
            waiting: Waiting::default(),
        };
        self.admission.admit(ingress, Listening(Arc::clone(&self.socket)));
    }
}

/// Errors of accept(2) that are about the connection and say nothing of the next.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}
