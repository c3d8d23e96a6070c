//! One SSH connection to a guest, from the stream into the network to the user who is let in, and its channels.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use russh::client::{self, ChannelOpenHandle, Handle, Msg, Session};
use russh::keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::{Channel, SshId};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::host::{HostKeyError, HostKeys, Taken};
use super::identity::Identity;
use super::{Timing, Tunnels};

/// Handshakes at once. OpenSSH turns away at random from the tenth on (sshd_config, MaxStartups).
const HANDSHAKES_MAX: usize = 4;
/// Channels after which a connection is not used again: russh keeps an answer for each that is refused.
const CHANNELS_MAX: u32 = 1_000;
/// Messages of a channel that wait for us; data is at most 32 KiB each.
const CHANNEL_MESSAGES: usize = 16;

/// Who is let in, and how.
pub(super) struct Login {
    pub(super) user: String,
    pub(super) identity: Identity,
    /// Asked for if the key does not suffice.
    pub(super) password: Option<String>,
}

/// Makes connections to one sshd.
pub(super) struct Dialer {
    tunnels: Arc<dyn Tunnels>,
    pub(super) target: SocketAddr,
    login: Login,
    host_keys: HostKeys,
    pub(super) timing: Timing,
    handshakes: Semaphore,
}

impl Dialer {
    pub(super) fn new(
        tunnels: Arc<dyn Tunnels>,
        target: SocketAddr,
        login: Login,
        host_keys: HostKeys,
        timing: Timing,
    ) -> Self {
        Self {
            tunnels,
            target,
            login,
            host_keys,
            timing,
            handshakes: Semaphore::new(HANDSHAKES_MAX),
        }
    }

    /// A new connection, the user let in.
    pub(super) async fn connect(&self) -> Result<Connection, ConnectError> {
        // Never closed.
        let _place = self.handshakes.acquire().await;
        let target = self.target;
        let late = |_| ConnectError::Late { target };
        let stream = timeout(self.timing.dial, self.tunnels.open(target))
            .await
            .map_err(late)?
            .map_err(|source| ConnectError::Tunnel { target, source })?;
        timeout(self.timing.handshake, self.handshake(stream))
            .await
            .map_err(late)?
    }

    async fn handshake(&self, stream: UnixStream) -> Result<Connection, ConnectError> {
        let target = self.target;
        let failed = |source| ConnectError::Ssh { target, source };
        let taken = self.host_keys.read()?;
        let config = client::Config {
            client_id: SshId::Standard(concat!("SSH-2.0-vnet_", env!("CARGO_PKG_VERSION")).into()),
            preferred: taken.preferred(),
            keepalive_interval: Some(self.timing.keepalive),
            channel_buffer_size: CHANNEL_MESSAGES,
            ..client::Config::default()
        };
        let end = ShutOnDrop::of(&stream).map_err(|source| ConnectError::Tunnel { target, source })?;
        let judge = Judge { taken };
        let mut handle = client::connect_stream(Arc::new(config), stream, judge)
            .await
            .map_err(|error| match error {
                JudgeError::HostKey(error) => ConnectError::HostKey(error),
                JudgeError::Ssh(source) => failed(source),
            })?;
        if !self.log_in(&mut handle).await.map_err(failed)? {
            return Err(ConnectError::Refused {
                user: self.login.user.clone(),
                target,
                identity: self.login.identity.path.clone(),
            });
        }
        Ok(Connection {
            handle,
            answer: self.timing.answer,
            channels: 0,
            _end: end,
        })
    }

    async fn log_in(&self, handle: &mut Handle<Judge>) -> Result<bool, russh::Error> {
        let Login {
            user,
            identity,
            password,
        } = &self.login;
        let hash = if identity.key.algorithm().is_rsa() {
            // The server's best; one that does not say is old, and has SHA-1 only.
            handle.best_supported_rsa_hash().await?.flatten()
        } else {
            None
        };
        let key = PrivateKeyWithHashAlg::new(Arc::clone(&identity.key), hash);
        if handle.authenticate_publickey(user.as_str(), key).await?.success() {
            return Ok(true);
        }
        match password {
            Some(password) => {
                let answer = handle.authenticate_password(user.as_str(), password.as_str());
                Ok(answer.await?.success())
            }
            None => Ok(false),
        }
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer")
            .field("target", &self.target)
            .field("user", &self.login.user)
            .field("identity", &self.login.identity)
            .finish_non_exhaustive()
    }
}

/// A connection whose user is let in. Dropping it ends it, whatever it is at.
pub(super) struct Connection {
    handle: Handle<Judge>,
    answer: Duration,
    channels: u32,
    _end: ShutOnDrop,
}

impl Connection {
    /// A channel to a socket of the guest.
    pub(super) async fn open(&mut self, path: &str) -> Result<Channel<Msg>, ChannelError> {
        self.channels = self.channels.saturating_add(1);
        let channel = self.handle.channel_open_direct_streamlocal(path);
        timeout(self.answer, channel)
            .await
            .map_err(|_| ChannelError::Late)?
            .map_err(ChannelError::Ssh)
    }

    /// Whether the guest answers. OpenSSH answers what it does not know with a refusal, which is an answer.
    pub(super) async fn is_alive(&self) -> bool {
        let answer = self.handle.send_global_request("alive@gvproxy", &[], true);
        matches!(
            timeout(self.answer, answer).await,
            Ok(Ok(_) | Err(russh::Error::RequestDenied))
        )
    }

    /// Whether it may serve another client, as far as is known.
    pub(super) fn is_fresh(&self) -> bool {
        !self.handle.is_closed() && self.channels < CHANNELS_MAX
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("channels", &self.channels)
            .finish_non_exhaustive()
    }
}

/// Ends a stream that a task of russh holds, and with it that task.
struct ShutOnDrop(OwnedFd);

impl ShutOnDrop {
    fn of(stream: &UnixStream) -> std::io::Result<Self> {
        stream.as_fd().try_clone_to_owned().map(Self)
    }
}

impl Drop for ShutOnDrop {
    fn drop(&mut self) {
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

/// Hears what the server says. It takes no channel that a server opens, which a client by its default would.
struct Judge {
    taken: Taken,
}

#[derive(Debug, thiserror::Error)]
enum JudgeError {
    #[error(transparent)]
    HostKey(HostKeyError),
    #[error(transparent)]
    Ssh(#[from] russh::Error),
}

impl client::Handler for Judge {
    type Error = JudgeError;

    async fn check_server_key(&mut self, found: &PublicKeyOrCertificate) -> Result<bool, JudgeError> {
        self.taken.check(found).map_err(JudgeError::HostKey)?;
        Ok(true)
    }

    // Each of these drops its handle, which refuses.

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        _: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), JudgeError> {
        Ok(())
    }

    async fn server_channel_open_forwarded_streamlocal(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), JudgeError> {
        Ok(())
    }

    async fn server_channel_open_agent_forward(
        &mut self,
        _: Channel<Msg>,
        _: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), JudgeError> {
        Ok(())
    }

    async fn server_channel_open_session(
        &mut self,
        _: Channel<Msg>,
        _: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), JudgeError> {
        Ok(())
    }

    async fn server_channel_open_direct_tcpip(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        _: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), JudgeError> {
        Ok(())
    }

    async fn server_channel_open_direct_streamlocal(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), JudgeError> {
        Ok(())
    }

    async fn server_channel_open_x11(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        _: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), JudgeError> {
        Ok(())
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The network gives no stream.
    #[error("there is no stream to {target}")]
    Tunnel {
        /// The guest's sshd.
        target: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It takes too long.
    #[error("{target} does not answer in time; is sshd running in the guest?")]
    Late {
        /// The guest's sshd.
        target: SocketAddr,
    },
    /// SSH fails, or the stream ends.
    #[error("no SSH with {target}; is sshd running in the guest?")]
    Ssh {
        /// The guest's sshd.
        target: SocketAddr,
        /// How.
        #[source]
        source: russh::Error,
    },
    /// The host's key is not taken.
    #[error(transparent)]
    HostKey(#[from] HostKeyError),
    /// The user's key is not taken.
    #[error(
        "{user} is not let in at {target} with the key of {}; its public key belongs into {user}'s authorized_keys",
        identity.display()
    )]
    Refused {
        /// The guest's user.
        user: String,
        /// The guest's sshd.
        target: SocketAddr,
        /// The file of the key.
        identity: PathBuf,
    },
}

impl ConnectError {
    /// Whether trying again changes nothing. That a user is not let in may change while a guest starts.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, Self::HostKey(_))
    }
}

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// It takes too long.
    #[error("the guest does not answer in time")]
    Late,
    /// The guest refuses it, or the connection ends.
    #[error(transparent)]
    Ssh(russh::Error),
}
