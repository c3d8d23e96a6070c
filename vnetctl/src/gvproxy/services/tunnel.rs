//! `/tunnel?ip=&port=`: a connection that becomes a stream into the network. And Unix sockets over
//! SSH ([`SshTunnels`]), which lead into guests too and are made elsewhere.
//!
//! A tunnel has no HTTP response: `OK`, and then the stream's bytes both ways. `OK` comes before anything is dialled,
//! and where nothing answers there the connection is closed, as in the peer; what the client sends meanwhile waits.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::answer::Answer;
use crate::gvproxy::Tunnels;
use crate::gvproxy::seldom::Seldom;
use crate::launch::tunnel_target;

/// Unix sockets of the host that lead to sockets of guests, over SSH.
#[tonic::async_trait]
pub trait SshTunnels: Send + Sync {
    /// Listens at `local`, an absolute path, and leads each client to the guest's socket that `remote` names, an
    /// `ssh-tunnel://` URL. What is in the way there is left as it is, unless it is a socket that nobody listens at.
    ///
    /// # Errors
    /// What is wrong, in gvproxy's words where it has any, on the first line; what helps, on those that follow.
    async fn expose(&self, local: &str, remote: &str) -> Result<(), String>;

    /// Ends it. One that is not there is ended already.
    fn unexpose(&self, local: &str);
}

/// What leads nowhere, where there is no network to lead into or no SSH.
#[derive(Debug, Clone, Copy)]
pub struct NoTunnels;

#[tonic::async_trait]
impl Tunnels for NoTunnels {
    async fn open(&self, _: SocketAddr) -> io::Result<UnixStream> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "no tunnels are served here",
        ))
    }
}

#[tonic::async_trait]
impl SshTunnels for NoTunnels {
    async fn expose(&self, _: &str, _: &str) -> Result<(), String> {
        Err("no forwards over SSH are served here".to_owned())
    }

    fn unexpose(&self, _: &str) {}
}

/// Where a tunnel is to lead, as the dataplane reads it on its own sockets.
///
/// # Errors
/// Its words, as an answer.
pub(super) fn target(query: &str) -> Result<SocketAddr, Answer> {
    tunnel_target(query).map_err(Answer::failed)
}

/// A tunnel that cannot be opened is told of once a second: whoever reaches a socket could fill the log with them.
static REFUSED: Seldom = Seldom::new(Duration::from_secs(1));

/// Serves a connection whose request was a tunnel's. `first` is what has been read beyond that.
pub(super) async fn serve<S>(mut stream: S, first: &[u8], target: SocketAddr, tunnels: &dyn Tunnels)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if stream.write_all(b"OK").await.is_err() {
        return;
    }
    let mut inside = match tunnels.open(target).await {
        Ok(inside) => inside,
        Err(error) => {
            if REFUSED.is_news(Instant::now()) {
                tracing::warn!(%target, %error, "a tunnel cannot be opened");
            }
            return;
        }
    };
    if inside.write_all(first).await.is_err() {
        return;
    }
    // Its end, either way, is told by the streams themselves.
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut inside).await;
}
