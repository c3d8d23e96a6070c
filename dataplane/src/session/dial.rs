//! Reaching the controlplane: a Unix socket by its path, or a connected stream that was inherited.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Where the controlplane is.
#[derive(Debug)]
pub enum Controlplane {
    /// Listens at this path; dialled again whenever the session ends.
    Unix(PathBuf),
    /// At the other end of this stream, until it ends.
    Inherited(StdUnixStream),
}

/// Makes connections.
#[derive(Debug)]
pub(super) enum Dialler {
    Unix(PathBuf),
    Inherited(Option<StdUnixStream>),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("{} cannot be reached", path.display())]
    Unix {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} did not answer within {CONNECT_PATIENCE:?}", path.display())]
    Timeout { path: PathBuf },
    #[error("the inherited stream is used up")]
    UsedUp,
    #[error("the inherited stream cannot be used")]
    Inherited(#[source] io::Error),
    #[error("the connection failed")]
    Transport(#[source] tonic::transport::Error),
}

impl Dialler {
    pub(super) fn new(controlplane: Controlplane) -> Self {
        match controlplane {
            Controlplane::Unix(path) => Self::Unix(path),
            Controlplane::Inherited(stream) => Self::Inherited(Some(stream)),
        }
    }

    /// Whether a further attempt can succeed.
    pub(super) fn can_dial(&self) -> bool {
        !matches!(self, Self::Inherited(None))
    }

    pub(super) async fn dial(&mut self) -> Result<Channel, DialError> {
        let stream = match self {
            Self::Unix(path) => {
                match tokio::time::timeout(CONNECT_PATIENCE, UnixStream::connect(&path)).await {
                    Ok(connected) => connected.map_err(|source| DialError::Unix {
                        path: path.clone(),
                        source,
                    })?,
                    Err(_) => return Err(DialError::Timeout { path: path.clone() }),
                }
            }
            Self::Inherited(stream) => {
                let stream = stream.take().ok_or(DialError::UsedUp)?;
                stream.set_nonblocking(true).map_err(DialError::Inherited)?;
                UnixStream::from_std(stream).map_err(DialError::Inherited)?
            }
        };
        let mut stream = Some(TokioIo::new(stream));
        Endpoint::from_static(AUTHORITY)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .connect_with_connector(tower::service_fn(move |_| {
                // Once: a channel that lost its connection must not dial again behind the session's back.
                let stream = stream.take().ok_or(io::ErrorKind::NotConnected);
                std::future::ready(stream.map_err(io::Error::from))
            }))
            .await
            .map_err(DialError::Transport)
    }
}

/// What HTTP/2 calls the other end; it decides nothing.
const AUTHORITY: &str = "http://controlplane.vnet";
/// How long connecting to a path may take (its listener's backlog may be full).
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Room for messages of the controlplane on the way.
const WINDOW_BYTES: u32 = 1 << 20;
