//! The user's own controlplane: where it is, and starting it when it does not answer.
//!
//! It is started under a lock, so that two first commands end with one; in a session of its own, so
//! that Ctrl-C or a closed terminal ends the command and not it; and with `--idle-exit`, so that it
//! ends by itself once nothing has been attached for a minute.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use vnet_controlplane::paths;
use vnet_controlplane::store::{self, Holder};

use super::descriptors::{inherit_only, own_session};
use crate::client::{Client, ConnectError, Server};
use crate::failure::{Failure, with_causes};
use crate::output::text::safe;

/// Where the user's own controlplane serves its API.
///
/// # Errors
/// When the path is too long for a socket.
pub fn own_server() -> Result<Server, Failure> {
    let path = paths::control_socket();
    paths::check_socket_path(&path).map_err(failed)?;
    Ok(Server::Unix(path))
}

/// Where the user's own controlplane logs, if there is a place for it.
pub fn own_log() -> Option<PathBuf> {
    paths::state_dir().ok().map(|dir| dir.join(LOG_FILE))
}

/// Where dataplanes connect to the controlplane that serves its API at `server`: beside it.
pub fn session_url(server: &Server) -> String {
    let Server::Unix(path) = server;
    format!("unix://{}", path.with_file_name(paths::SESSION_SOCKET).display())
}

/// Starts the user's own controlplane, unless somebody else just did, and connects to it.
///
/// # Errors
/// When it cannot be started, ends at once, or does not answer in time.
pub async fn controlplane(server: &Server) -> Result<Client, Failure> {
    let Server::Unix(socket) = server;
    let runtime_dir = socket.parent().unwrap_or(Path::new("/"));
    paths::ensure_private_dir(runtime_dir).map_err(|error| SOCKETS.unusable(&error))?;
    let deadline = Instant::now() + START_PATIENCE;
    let _lock = lock(&runtime_dir.join(LOCK_FILE), deadline).await?;

    let mut started: Option<Started> = None;
    loop {
        match Client::connect(server).await {
            Ok(client) if client.answers().await => return Ok(client),
            Ok(_) => {}
            Err(ConnectError::Absent { .. }) if started.is_none() => started = Some(start(socket)?),
            Err(ConnectError::Absent { .. }) => {}
            // It has lines of its own.
            Err(ConnectError::NoAnswer(none)) => return Err(Failure::Failed(none.whole())),
            Err(error) => return Err(failed(error)),
        }
        if let Some(started) = &mut started
            && let Some(status) = started.child.try_wait().map_err(failed)?
        {
            return Err(Failure::Failed(match started.in_the_way() {
                Some(holder) => in_use(&started.state_dir, &holder),
                None => format!("the controlplane ended at once ({status}){}", started.said()),
            }));
        }
        if Instant::now() >= deadline {
            let said = started.as_mut().map(Started::said).unwrap_or_default();
            return Err(Failure::Failed(format!(
                "the controlplane does not answer at {server} after {} s{said}",
                START_PATIENCE.as_secs()
            )));
        }
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}

/// This process as the controlplane.
pub(super) fn main(arguments: Vec<OsString>) -> ExitCode {
    super::parsed(arguments, vnet_controlplane::main)
}

/// A controlplane that was just started, and where its words go.
struct Started {
    child: Child,
    state_dir: PathBuf,
    log: Option<(PathBuf, u64)>,
}

impl Started {
    /// The controlplane that has the state, and was not found where this user's sockets are looked for.
    fn in_the_way(&self) -> Option<Holder> {
        let holder = store::holder(&self.state_dir.join(paths::STATE_FILE))?;
        let pid = Pid::from_raw(i32::try_from(holder.pid).ok()?);
        // One that may not be asked is there.
        let is_there = kill(pid, None) != Err(Errno::ESRCH);
        (is_there && holder.pid != self.child.id()).then_some(holder)
    }

    /// The last of what it said since it was started.
    fn said(&mut self) -> String {
        let Some((path, from)) = &self.log else {
            return String::new();
        };
        let read = || -> io::Result<String> {
            let mut file = File::open(path)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(
                (*from).max(length.saturating_sub(SAID_BYTES_MAX)),
            ))?;
            let mut text = Vec::new();
            file.take(SAID_BYTES_MAX).read_to_end(&mut text)?;
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        let text = read().unwrap_or_default();
        let lines: Vec<String> = text.lines().map(|line| format!("\n  {}", safe(line))).collect();
        let last = lines.len().saturating_sub(SAID_LINES_MAX);
        format!(
            "{}\n  its log: {}",
            lines[last..].concat(),
            safe(&path.to_string_lossy())
        )
    }
}

fn start(socket: &Path) -> Result<Started, Failure> {
    let state_dir = paths::state_dir().map_err(failed)?;
    paths::ensure_private_dir(&state_dir).map_err(|error| STATE.unusable(&error))?;
    let state = state_dir.join(paths::STATE_FILE);
    // As of a run with sudo. It would be found in the log alone, which may be another's as well.
    if let Err(error) = OpenOptions::new().read(true).write(true).open(&state)
        && error.kind() == io::ErrorKind::PermissionDenied
    {
        return Err(STATE.refused(&state, &error));
    }
    let log_path = state_dir.join(LOG_FILE);
    let (stderr, log) = match open_log(&log_path) {
        Ok((file, from)) => (Stdio::from(file), Some((log_path, from))),
        // A full disk must not keep it from serving.
        Err(_) => (Stdio::null(), None),
    };
    let mut store = OsString::from("sqlite:");
    store.push(state);
    let mut command = Command::new(super::own_executable()?);
    command
        .arg0("vnet-controlplane")
        .arg(super::CONTROLPLANE_ROLE)
        .arg("--listen")
        .arg(url(socket))
        .arg("--session-listen")
        .arg(url(&socket.with_file_name(paths::SESSION_SOCKET)))
        .arg("--store")
        .arg(store)
        .args(["--if-absent", "--idle-exit", IDLE_EXIT_SECONDS])
        .env("NO_COLOR", "1")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr);
    if std::env::var_os("RUST_LOG").is_none() {
        // Its log is looked at when something went wrong; what went well is in the history.
        command.args(["--log-level", "warn"]);
    }
    own_session(&mut command);
    inherit_only(&mut command, &[]);
    let child = command
        .spawn()
        .map_err(|e| Failure::Failed(format!("cannot start the controlplane: {e}")))?;
    Ok(Started {
        child,
        state_dir,
        log,
    })
}

/// A place of this user's: what it is for, and the variable that names another.
#[derive(Clone, Copy)]
struct Own {
    what: &'static str,
    variable: &'static str,
}

const SOCKETS: Own = Own {
    what: "sockets",
    variable: "XDG_RUNTIME_DIR",
};
const STATE: Own = Own {
    what: "state",
    variable: "XDG_STATE_HOME",
};

impl Own {
    /// What is said where it cannot be used.
    fn unusable(self, error: &paths::PathError) -> Failure {
        match error {
            paths::PathError::Io { path, source } => self.refused(path, source),
            // What it says to do is for who names the place.
            paths::PathError::Owner { path, owner, wanted } => {
                let why = format!("it belongs to uid {owner}, not to uid {wanted}");
                self.told(path, &why, true)
            }
            error => Failure::Failed(safe(&format!("the place for {}: {error}", self.what)).into_owned()),
        }
    }

    /// What is said where the system does not let it, or a file in it, be used.
    fn refused(self, path: &Path, error: &io::Error) -> Failure {
        let is_of_rights = matches!(
            error.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
        );
        self.told(path, &error.to_string(), is_of_rights)
    }

    fn told(self, path: &Path, why: &str, is_of_rights: bool) -> Failure {
        let Self { what, variable } = self;
        let uid = nix::unistd::geteuid();
        let give = if is_of_rights {
            format!("give it to uid {uid}, or ")
        } else {
            String::new()
        };
        let text = format!(
            "{}, this user's place for {what}, cannot be used: {why} ({give}set {variable} to another directory)",
            path.display()
        );
        Failure::Failed(safe(&text).into_owned())
    }
}

/// What is said where another controlplane has the state: who that is, and what of the environment makes the
/// difference.
fn in_use(state_dir: &Path, holder: &Holder) -> String {
    let shared = match &holder.serves {
        Some(serves) => format!("to use that one, set XDG_RUNTIME_DIR as it has, or VNET_SERVER={serves}"),
        None => "to use that one, set XDG_RUNTIME_DIR as it has".to_owned(),
    };
    safe(&format!(
        "the state in {} is in use by the controlplane of another XDG_RUNTIME_DIR ({}); {shared}; to have another, \
         set XDG_STATE_HOME to a directory of its own",
        state_dir.display(),
        holder.words()
    ))
    .into_owned()
}

/// The log to append to, and its length now. One that has grown past its limit makes room first; the
/// one before is kept.
fn open_log(path: &Path) -> io::Result<(File, u64)> {
    if fs::metadata(path).is_ok_and(|m| m.len() > LOG_BYTES_MAX) {
        fs::rename(path, path.with_extension("log.old"))?;
    }
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

/// Takes the lock, however many others want it too, until the deadline.
async fn lock(path: &Path, deadline: Instant) -> Result<Flock<File>, Failure> {
    let named = |e: &dyn std::fmt::Display| Failure::Failed(format!("cannot lock {}: {e}", path.display()));
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| SOCKETS.refused(path, &error))?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = back,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                return Err(named(
                    &"another command holds it; it is starting the controlplane and does not end",
                ));
            }
            Err((_, error)) => return Err(named(&error)),
        }
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}

fn url(path: &Path) -> OsString {
    let mut url = OsString::from("unix://");
    url.push(path);
    url
}

fn failed(error: impl std::error::Error) -> Failure {
    Failure::Failed(safe(&with_causes(&error)).into_owned())
}

const LOCK_FILE: &str = "start.lock";
const LOG_FILE: &str = "controlplane.log";
/// It ends by itself after this long with nothing attached.
const IDLE_EXIT_SECONDS: &str = "60";
/// A first start makes its store; a slow disk may take seconds.
const START_PATIENCE: Duration = Duration::from_secs(15);
const PROBE_INTERVAL: Duration = Duration::from_millis(20);
const LOG_BYTES_MAX: u64 = 1 << 20;
const SAID_BYTES_MAX: u64 = 4096;
const SAID_LINES_MAX: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vnetctl-{name}-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    #[test]
    fn a_log_past_its_limit_makes_room_and_is_kept_once() {
        let path = temporary("log").with_extension("log");
        fs::write(&path, vec![b'x'; LOG_BYTES_MAX as usize + 1]).unwrap();

        let (_, length) = open_log(&path).unwrap();

        assert_eq!(length, 0);
        let old = path.with_extension("log.old");
        assert_eq!(fs::metadata(&old).unwrap().len(), LOG_BYTES_MAX + 1);
        fs::remove_file(&old).unwrap();
        fs::remove_file(&path).unwrap();
    }

    #[tokio::test]
    async fn a_lock_that_another_holds_is_waited_for_until_the_deadline() {
        let path = temporary("lock");
        let held = lock(&path, Instant::now()).await.unwrap();

        let refused = lock(&path, Instant::now()).await.unwrap_err();

        assert!(
            refused.to_string().contains("another command holds it"),
            "{refused}"
        );
        drop(held);
        lock(&path, Instant::now()).await.unwrap();
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_place_that_cannot_be_used_is_told_with_whose_it_should_be_and_what_names_another() {
        let denied = || io::Error::from_raw_os_error(libc::EACCES);
        let uid = nix::unistd::geteuid();
        let path = || PathBuf::from("/s/vnet");
        let io = |source| paths::PathError::Io { path: path(), source };
        let place = "/s/vnet, this user's place for state, cannot be used:";
        assert_eq!(
            STATE.unusable(&io(denied())).to_string(),
            format!(
                "{place} Permission denied (os error 13) (give it to uid {uid}, or set XDG_STATE_HOME to another \
                 directory)"
            )
        );
        assert_eq!(
            STATE
                .unusable(&io(io::Error::from_raw_os_error(libc::ENOTDIR)))
                .to_string(),
            format!("{place} Not a directory (os error 20) (set XDG_STATE_HOME to another directory)")
        );
        let owner = paths::PathError::Owner {
            path: path(),
            owner: 7,
            wanted: 9,
        };
        assert_eq!(
            STATE.unusable(&owner).to_string(),
            format!(
                "{place} it belongs to uid 7, not to uid 9 (give it to uid {uid}, or set XDG_STATE_HOME to another \
                 directory)"
            )
        );
        assert_eq!(
            SOCKETS.refused(Path::new("/r/start.lock"), &denied()).to_string(),
            format!(
                "/r/start.lock, this user's place for sockets, cannot be used: Permission denied (os error 13) (give \
                 it to uid {uid}, or set XDG_RUNTIME_DIR to another directory)"
            )
        );
        let mode = paths::PathError::Mode {
            path: path(),
            mode: 0o755,
        };
        assert_eq!(
            SOCKETS.unusable(&mode).to_string(),
            "the place for sockets: /s/vnet has mode 0755, so others may enter it; run: chmod 700 /s/vnet"
        );
    }

    #[test]
    fn sessions_are_served_beside_the_api() {
        let server = Server::Unix("/run/user/7/vnet/control.sock".into());
        assert_eq!(session_url(&server), "unix:///run/user/7/vnet/session.sock");
    }
}
