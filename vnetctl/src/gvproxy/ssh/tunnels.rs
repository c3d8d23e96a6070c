//! Sockets of the host that come and go at run time, and lead to sockets of guests over SSH: what
//! `/services/forwarder/{expose,unexpose,all}` does for `ssh-tunnel://`.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::task::JoinHandle;

use super::connection::{Dialer, Login};
use super::guest::Guest;
use super::host::{self, HostKeyError, HostKeys};
use super::identity::{Identity, IdentityError};
use super::remote::{Remote, RemoteError, redacted};
use super::serve::{self, Counts, CountsNow};
use super::socket::{self, SocketError, SocketFile};
use super::{Timing, Tunnels};

/// Sockets at once.
pub const EXPOSED_MAX: usize = 256;

/// The sockets of one network. Dropping it ends them all.
pub struct SshTunnels {
    tunnels: Arc<dyn Tunnels>,
    timing: Timing,
    known_hosts: Option<PathBuf>,
    open: Mutex<BTreeMap<String, Open>>,
}

/// One of them, as the services API lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exposed {
    /// The host's socket, as it was given.
    pub local: String,
    /// The URL, as it was given but for `xxxxx` in place of a password or passphrase.
    pub remote: String,
    /// `unix`.
    pub protocol: &'static str,
}

struct Open {
    remote: String,
    counts: Arc<Counts>,
    clients: JoinHandle<()>,
    // Removes the socket.
    _file: SocketFile,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.clients.abort();
    }
}

impl SshTunnels {
    /// None yet. With `secure=true`, host keys are those of `~/.ssh/known_hosts`.
    pub fn new(tunnels: Arc<dyn Tunnels>, timing: Timing) -> Self {
        Self::with_known_hosts(tunnels, timing, host::known_hosts())
    }

    /// None yet, and another `known_hosts`.
    pub fn with_known_hosts(tunnels: Arc<dyn Tunnels>, timing: Timing, known_hosts: Option<PathBuf>) -> Self {
        Self {
            tunnels,
            timing,
            known_hosts,
            open: Mutex::default(),
        }
    }

    /// Listens at the path `local` for clients of the socket that `remote` names, an `ssh-tunnel://` URL. The key is
    /// read now; SSH is opened by the first client.
    ///
    /// # Errors
    /// [`ExposeError`]; nothing has changed then.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn expose(&self, local: &str, remote: &str) -> Result<(), ExposeError> {
        // Before anything else, as in the peer.
        Self::check_free(&self.lock(), local)?;
        let shown = redacted(remote);
        let remote = Remote::parse(remote)?;
        let host_keys = match (remote.secure, &self.known_hosts) {
            (false, _) => HostKeys::Ignored,
            (true, None) => return Err(HostKeyError::NoHome.into()),
            (true, Some(file)) => HostKeys::Known {
                file: file.clone(),
                host: remote.target.ip().to_string(),
                port: remote.target.port(),
            },
        };
        let Remote { key, passphrase, .. } = remote;
        let reading = tokio::task::spawn_blocking(move || Identity::read(&key, passphrase.as_deref()));
        let identity = match reading.await {
            Ok(identity) => identity?,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let login = Login {
            user: remote.user,
            identity,
            password: remote.password,
        };
        let tunnels = Arc::clone(&self.tunnels);
        let dialer = Dialer::new(tunnels, remote.target, login, host_keys, self.timing.clone());
        let guest = Arc::new(Guest::new(dialer, remote.path));

        let mut open = self.lock();
        // Another may have come first.
        Self::check_free(&open, local)?;
        let (listener, file) = socket::bind(Path::new(local))?;
        let counts = Arc::<Counts>::default();
        let serving = (Arc::clone(&counts), file.path().to_owned(), self.timing.gone);
        let clients = tokio::spawn(async move {
            let (counts, path, gone) = serving;
            match serve::serve(listener, &path, guest, counts, gone).await {}
        });
        open.insert(
            local.to_owned(),
            Open {
                remote: shown,
                counts,
                clients,
                _file: file,
            },
        );
        Ok(())
    }

    /// Ends a socket: it is removed, and its clients are cut off.
    ///
    /// # Errors
    /// [`ExposeError::NotFound`].
    pub fn unexpose(&self, local: &str) -> Result<(), ExposeError> {
        match self.lock().entry(local.to_owned()) {
            Entry::Occupied(open) => {
                open.remove();
                Ok(())
            }
            Entry::Vacant(_) => Err(ExposeError::NotFound),
        }
    }

    /// All of them, by path.
    pub fn all(&self) -> Vec<Exposed> {
        let open = self.lock();
        open.iter()
            .map(|(local, open)| Exposed {
                local: local.clone(),
                remote: open.remote.clone(),
                protocol: "unix",
            })
            .collect()
    }

    /// What is counted of a socket, if there is one.
    pub fn counts(&self, local: &str) -> Option<CountsNow> {
        self.lock().get(local).map(|open| open.counts.now())
    }

    fn check_free(open: &BTreeMap<String, Open>, local: &str) -> Result<(), ExposeError> {
        if open.contains_key(local) {
            return Err(ExposeError::Running(local.to_owned()));
        }
        if open.len() >= EXPOSED_MAX {
            return Err(ExposeError::TooMany);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for SshTunnels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SshTunnels")
            .field("all", &self.all())
            .finish_non_exhaustive()
    }
}

/// Why nothing was exposed, or ended. The texts are the peer's, where it has any.
#[derive(Debug, thiserror::Error)]
pub enum ExposeError {
    /// There is one.
    #[error("proxy already running for unix on {0}")]
    Running(String),
    /// There is none.
    #[error("proxy not found")]
    NotFound,
    /// There are as many as there may be.
    #[error("there are {EXPOSED_MAX} sockets over SSH already; unexpose one first")]
    TooMany,
    /// The URL.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// Its key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its host's key.
    #[error(transparent)]
    HostKey(#[from] HostKeyError),
    /// The host's socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
}
