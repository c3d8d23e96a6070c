//! What the front's parts need of the dataplane: a stream to an address of the network.

use std::io;
use std::net::SocketAddr;

use tokio::net::UnixStream;

/// Opens streams into the network of the guests, as a forward would.
#[tonic::async_trait]
pub trait Tunnels: Send + Sync + 'static {
    /// A stream to an address and port of the network. It may be handed out before the address has answered; one that
    /// does not answer ends it.
    ///
    /// # Errors
    /// When none can be had.
    async fn open(&self, target: SocketAddr) -> io::Result<UnixStream>;
}
