//! Sockets of the host that lead to sockets of a guest, over SSH: `-forward-*`, and what is exposed as `ssh-tunnel://`.
//!
//! - [`Forward`] is one of `-forward-*`: [`Forward::bind`] makes the host's socket, [`Forward::run`] connects and
//!   serves;
//! - [`SshTunnels`] are those that come and go at run time, as the services API says;
//!
//! Both need [`Tunnels`] of the dataplane.
//!
//! In order: a client connects at the host's socket (`socket`, `serve`); it is given an SSH connection to the guest
//! (`guest`, which keeps a few, `connection`) with a channel to the guest's socket, and its bytes go through that
//! (`relay`). Keys are read by `identity`, host keys judged by `host`, URLs read by `remote`. The protocol is the
//! crate `russh`; channels are `direct-streamlocal@openssh.com` (OpenSSH, PROTOCOL, 2.4).
//!
//! **A connection carries one client at a time.** russh opens a channel's window again when data arrives rather than
//! when it is taken, so that a client which does not read stops, sooner or later, everything else on its connection
//! (Eugeny/russh, pull request 730). So no two share one; connections are used again, and few are kept.
//!
//! Everything here ends by being dropped: sockets are removed, and streams are shut down, at once.

mod connection;
mod guest;
mod host;
mod identity;
mod relay;
mod remote;
mod serve;
mod socket;
mod tunnels;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use connection::{ChannelError, ConnectError};
pub use guest::OpenError;
pub use host::HostKeyError;
pub use identity::{Identity, IdentityCause, IdentityError};
pub(in crate::gvproxy) use remote::redacted;
pub use remote::{Remote, RemoteError};
pub use serve::{CLIENTS_MAX, Counts, CountsNow};
pub use socket::SocketError;
pub use tunnels::{EXPOSED_MAX, ExposeError, Exposed, SshTunnels};

use super::Tunnels;
use super::config::SshForward;
use connection::{Dialer, Login};
use guest::Guest;
use host::HostKeys;
use socket::SocketFile;

/// The guest's port, where nothing else is said.
pub const PORT_DEFAULT: u16 = 22;

/// How often and how long is tried. The default is gvproxy's, where gvproxy has any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    /// Tries for the first connection.
    pub first_tries: u32,
    /// The pause after the first of them; it doubles.
    pub first_pause: Duration,
    /// Its limit.
    pub first_pause_max: Duration,
    /// How long a client waits for the first connection of what was exposed.
    pub first_use: Duration,
    /// The pause between later tries.
    pub pause: Duration,
    /// How long a stream into the network may take.
    pub dial: Duration,
    /// How long SSH may take from there until the user is let in.
    pub handshake: Duration,
    /// How long the guest may take to open a channel, or to say that it lives.
    pub answer: Duration,
    /// Silence after which the guest is asked whether it lives; three times unanswered ends a connection.
    pub keepalive: Duration,
    /// How long the guest may keep the channel of a client that has closed its socket.
    pub gone: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            first_tries: 60,
            first_pause: Duration::from_millis(100),
            first_pause_max: Duration::from_secs(1),
            first_use: Duration::from_secs(10),
            pause: Duration::from_millis(200),
            dial: Duration::from_secs(5),
            handshake: Duration::from_secs(30),
            answer: Duration::from_secs(10),
            keepalive: Duration::from_secs(30),
            gone: Duration::from_secs(60),
        }
    }
}

/// A socket of the host that leads to one of the guest. Dropping it ends it.
#[derive(Debug)]
pub struct Forward {
    listener: tokio::net::UnixListener,
    file: SocketFile,
    guest: Arc<Guest>,
    counts: Arc<Counts>,
    gone: Duration,
}

impl Forward {
    /// Makes the host's socket, mode 0600, in place of an older one, and reads the key. Clients may connect from now
    /// on; they wait. `target` is the guest's sshd.
    ///
    /// # Errors
    /// [`ForwardError`]; no socket is left.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn bind(
        forward: &SshForward,
        target: SocketAddr,
        tunnels: Arc<dyn Tunnels>,
        timing: Timing,
    ) -> Result<Self, ForwardError> {
        let failed = |cause| ForwardError {
            socket: forward.socket.clone(),
            cause: Box::new(cause),
        };
        let (listener, file) = socket::replace(&forward.socket).map_err(|error| failed(error.into()))?;
        let identity = Identity::read(&forward.identity, None).map_err(|error| failed(error.into()))?;
        let login = Login {
            user: forward.user.clone(),
            identity,
            password: None,
        };
        let gone = timing.gone;
        // The guest's address is one of our own network, and its key is made when it starts for the first time.
        let dialer = Dialer::new(tunnels, target, login, HostKeys::Ignored, timing);
        Ok(Self {
            listener,
            file,
            guest: Arc::new(Guest::new(dialer, forward.dest.clone())),
            counts: Arc::default(),
            gone,
        })
    }

    /// What is counted.
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    /// Connects to the guest, as often as [`Timing`] says, and serves clients for as long as it is polled.
    ///
    /// # Errors
    /// That the guest could not be reached at first. Later failures end single clients, and are logged.
    pub async fn run(self) -> Result<std::convert::Infallible, ForwardError> {
        // The file goes with this future.
        let file = self.file;
        let failed = |error: ConnectError| ForwardError {
            socket: file.path().to_owned(),
            cause: Box::new(error.into()),
        };
        self.guest.connect_first().await.map_err(failed)?;
        tracing::debug!(socket = %file.path().display(), "forward over SSH is established");
        match serve::serve(self.listener, file.path(), self.guest, self.counts, self.gone).await {}
    }
}

/// Why a forward is none.
#[derive(Debug, thiserror::Error)]
#[error("SSH forward {}", socket.display())]
pub struct ForwardError {
    /// The host's socket.
    pub socket: PathBuf,
    /// Why.
    #[source]
    pub cause: Box<ForwardCause>,
}

/// Why a forward is none.
#[derive(Debug, thiserror::Error)]
pub enum ForwardCause {
    /// Its socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Its key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The guest, after every try.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

#[cfg(test)]
mod tests;
