//! The clients of one socket: taken one after another, served side by side, bounded and counted.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use super::guest::{Guest, OpenError};
use super::relay::relay;
use crate::failure::with_causes;

/// Clients of one socket at once. One more is hung up on.
pub const CLIENTS_MAX: usize = 256;
/// The pause after the system could not give a client.
const REST: Duration = Duration::from_millis(100);

/// What is counted of a socket.
#[derive(Debug, Default)]
pub struct Counts {
    clients: AtomicU64,
    served: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
}

/// What is counted of a socket, at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CountsNow {
    /// Clients that are connected.
    pub clients: u64,
    /// Clients that were given a channel.
    pub served: u64,
    /// Clients that were too many.
    pub refused: u64,
    /// Clients for whom the guest had no channel.
    pub failed: u64,
}

impl Counts {
    /// The counts of this moment.
    pub fn now(&self) -> CountsNow {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        CountsNow {
            clients: read(&self.clients),
            served: read(&self.served),
            refused: read(&self.refused),
            failed: read(&self.failed),
        }
    }

    fn add(count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Serves clients until it is dropped, and then none of them.
pub(super) async fn serve(
    listener: UnixListener,
    path: &Path,
    guest: Arc<Guest>,
    counts: Arc<Counts>,
    gone: Duration,
) -> Infallible {
    let path: Arc<Path> = path.into();
    let mut clients = JoinSet::new();
    // Told once each time that it begins.
    let mut is_told = false;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) if clients.len() < CLIENTS_MAX => {
                    is_told = false;
                    let present = Present::new(&counts);
                    clients.spawn(client_of(client, Arc::clone(&path), Arc::clone(&guest), present, gone));
                }
                Ok(_) => {
                    Counts::add(&counts.refused);
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::warn!(socket = %path.display(), limit = CLIENTS_MAX, "too many clients over SSH");
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::warn!(socket = %path.display(), %error, "cannot take a client");
                    }
                    tokio::time::sleep(REST).await;
                }
            },
            Some(_) = clients.join_next(), if !clients.is_empty() => {}
        }
    }
}

async fn client_of(client: UnixStream, path: Arc<Path>, guest: Arc<Guest>, present: Present, gone: Duration) {
    match guest.open().await {
        Ok((connection, channel)) => {
            Counts::add(&present.0.served);
            if relay(client, channel, gone).await {
                guest.give_back(connection);
            }
        }
        Err(error) => {
            Counts::add(&present.0.failed);
            tracing::error!("{}", hung_up_on(&path, &guest, &error));
        }
    }
}

/// What is said where a client is hung up on: at which socket, what it leads to, and why.
pub(super) fn hung_up_on(path: &Path, guest: &Guest, error: &OpenError) -> String {
    let why = with_causes(error);
    format!(
        "SSH forward {} to {guest}: a client was hung up on: {why}",
        path.display()
    )
}

/// A client that is counted.
struct Present(Arc<Counts>);

impl Present {
    fn new(counts: &Arc<Counts>) -> Self {
        Counts::add(&counts.clients);
        Self(Arc::clone(counts))
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}
