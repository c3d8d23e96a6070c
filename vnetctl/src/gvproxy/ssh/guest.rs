//! The sshd of a guest: a few connections that nobody uses, and channels to one of its sockets, tried as often as the
//! peer tries.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use russh::Channel;
use russh::client::Msg;
use tokio::sync::OnceCell;
use tokio::time::{sleep, timeout};

use super::connection::{ChannelError, ConnectError, Connection, Dialer};
use crate::failure::with_causes;

/// Connections that are kept while nobody uses them.
const IDLE_MAX: usize = 4;
/// Tries for a channel.
const CHANNEL_TRIES: u32 = 3;
/// Tries for a connection, where there was one before.
const RECONNECTS: u32 = 3;

/// A socket of a guest, and the way to it.
#[derive(Debug)]
pub(super) struct Guest {
    dialer: Dialer,
    /// The guest's socket.
    path: String,
    /// Whether there has been a connection.
    first: OnceCell<()>,
    /// Nobody uses these. The last one in is the first one out, so that the others end with the guest's patience.
    idle: Mutex<Vec<Connection>>,
}

impl Guest {
    pub(super) fn new(dialer: Dialer, path: String) -> Self {
        Self {
            dialer,
            path,
            first: OnceCell::new(),
            idle: Mutex::default(),
        }
    }

    /// The first connection: a guest may still be starting. Whoever comes meanwhile waits for the same.
    pub(super) async fn connect_first(&self) -> Result<(), ConnectError> {
        self.first.get_or_try_init(|| self.try_first()).await?;
        Ok(())
    }

    async fn try_first(&self) -> Result<(), ConnectError> {
        let timing = &self.dialer.timing;
        let mut pause = timing.first_pause;
        let mut left = timing.first_tries;
        loop {
            left = left.saturating_sub(1);
            match self.dialer.connect().await {
                Ok(connection) => {
                    self.give_back(connection);
                    return Ok(());
                }
                Err(error) if left == 0 || error.is_final() => return Err(error),
                Err(error) => tracing::debug!(error = with_causes(&error), left, "waiting for sshd"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(timing.first_pause_max);
        }
    }

    /// A channel to the guest's socket, with a connection of its own.
    pub(super) async fn open(&self) -> Result<(Connection, Channel<Msg>), OpenError> {
        let timing = &self.dialer.timing;
        let target = self.dialer.target;
        if !self.first.initialized() {
            timeout(timing.first_use, self.connect_first())
                .await
                .unwrap_or(Err(ConnectError::Late { target }))?;
        }
        let mut connection = match self.take() {
            Some(connection) => connection,
            None => self.reconnect().await?,
        };
        let mut tries = 1;
        loop {
            let source = match connection.open(&self.path).await {
                Ok(channel) => return Ok((connection, channel)),
                Err(source) => source,
            };
            let is_alive = connection.is_alive().await;
            if tries == CHANNEL_TRIES {
                if is_alive {
                    self.give_back(connection);
                }
                let path = self.path.clone();
                return Err(OpenError::Channel { path, source });
            }
            if is_alive {
                sleep(timing.pause).await;
            } else {
                connection = self.reconnect().await?;
            }
            tries += 1;
        }
    }

    /// A connection that nobody uses any more, and whose channel is closed.
    pub(super) fn give_back(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(Connection::is_fresh);
        if connection.is_fresh() && idle.len() < IDLE_MAX {
            idle.push(connection);
        }
    }

    fn take(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(Connection::is_fresh);
        idle.pop()
    }

    async fn reconnect(&self) -> Result<Connection, ConnectError> {
        let mut left = RECONNECTS;
        loop {
            left -= 1;
            match self.dialer.connect().await {
                Ok(connection) => return Ok(connection),
                Err(error) if left == 0 || error.is_final() => return Err(error),
                Err(error) => tracing::debug!(error = with_causes(&error), left, "connecting again"),
            }
            sleep(self.dialer.timing.pause).await;
        }
    }
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.path, self.dialer.target)
    }
}

/// Why a client is not served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// There is no channel.
    #[error(
        "the guest's socket {path} cannot be reached; does something listen there, and may the user connect?"
    )]
    Channel {
        /// The guest's socket.
        path: String,
        /// Why.
        #[source]
        source: ChannelError,
    },
}
