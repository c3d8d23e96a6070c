//! A dataplane of one's own: a child of `run` or `up`, that ends with it whatever ends it.
//!
//! It is told where its controlplane is and how its guests are to be treated, and inherits the guest's
//! link and a lifeline: the reading end of a pipe that nobody writes to. When this process is gone,
//! killed or not, the kernel closes the other end, and the dataplane ends as if it had been asked to.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};

use super::descriptors::inherit_only;
use crate::output::text::safe;

/// What a dataplane is told at its start.
#[derive(Debug, Default)]
pub struct Settings {
    /// Its flags, as `vnet-dataplane` takes them.
    pub flags: Vec<OsString>,
    /// Descriptors it inherits under the numbers that the flags name.
    pub inherited: Vec<OwnedFd>,
    /// Whether it speaks to the terminal itself, as under `up`. Otherwise its words are kept, to be
    /// shown when it fails: the terminal is the command's.
    pub speaks: bool,
}

/// A running dataplane.
#[derive(Debug)]
pub struct Dataplane {
    child: Child,
    /// Closing it ends the dataplane.
    lifeline: Option<io::PipeWriter>,
    said: Arc<Mutex<Vec<u8>>>,
}

/// Why a dataplane did not start or did not stay.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// It could not be started.
    #[error("cannot start the dataplane: {0}")]
    Start(#[source] io::Error),
    /// It ended by itself.
    #[error("the dataplane ended ({status}){said}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// Its last words.
        said: String,
    },
}

impl Dataplane {
    /// Starts one.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn start(settings: Settings) -> Result<Self, DataplaneError> {
        let start = DataplaneError::Start;
        let program = super::own_executable().map_err(|e| start(io::Error::other(e)))?;
        let (reader, lifeline) = io::pipe().map_err(start)?;
        let reader = OwnedFd::from(reader);
        let mut command = std::process::Command::new(program);
        command
            .arg0("vnet-dataplane")
            .arg(super::DATAPLANE_ROLE)
            .arg(reader.as_raw_fd().to_string())
            .args(&settings.flags)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(if settings.speaks { Stdio::inherit() } else { Stdio::piped() })
            // Ctrl-C is for this process, which ends the dataplane when it is ready to.
            .process_group(0);
        let keep: Vec<&OwnedFd> = settings.inherited.iter().chain([&reader]).collect();
        inherit_only(&mut command, &keep);
        let mut child = Command::from(command).kill_on_drop(true).spawn().map_err(start)?;
        let said = Arc::default();
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(listen(stderr, Arc::clone(&said)));
        }
        Ok(Self { child, lifeline: Some(lifeline), said })
    }

    /// Waits until it ends by itself. Cancel safe.
    pub async fn ended(&mut self) -> DataplaneError {
        match self.child.wait().await {
            Ok(status) => {
                // Its last words may still be on their way from the pipe.
                tokio::time::sleep(LAST_WORDS_PATIENCE).await;
                DataplaneError::Ended { status, said: self.said() }
            }
            Err(error) => DataplaneError::Start(error),
        }
    }

    /// Ends it: asked first, then made to.
    pub async fn stop(mut self) {
        drop(self.lifeline.take());
        if tokio::time::timeout(STOP_PATIENCE, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }

    /// The last of what it said.
    fn said(&self) -> String {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&said).into_owned();
        let lines: Vec<String> = text.lines().map(|line| format!("\n  {}", safe(line))).collect();
        lines[lines.len().saturating_sub(SAID_LINES_MAX)..].concat()
    }
}

/// Keeps the last of what it says.
async fn listen(mut stderr: tokio::process::ChildStderr, said: Arc<Mutex<Vec<u8>>>) {
    let mut chunk = [0; 1024];
    while let Ok(length @ 1..) = stderr.read(&mut chunk).await {
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        said.extend_from_slice(&chunk[..length]);
        let excess = said.len().saturating_sub(SAID_BYTES_MAX);
        said.drain(..excess);
    }
}

/// This process as the dataplane: the number of its lifeline, then flags as `vnet-dataplane` takes them.
pub(super) fn main(mut arguments: Vec<OsString>) -> u8 {
    let lifeline = if arguments.len() > 1 { arguments.remove(1) } else { OsString::new() };
    match lifeline.to_str().and_then(|number| number.parse::<RawFd>().ok()).filter(|fd| *fd > 2) {
        Some(fd) => hold(fd),
        None => {
            let _ = writeln!(io::stderr(), "error: {lifeline:?} is not the number of a lifeline");
            return crate::failure::EXIT_USAGE;
        }
    }
    vnet_dataplane::main(arguments)
}

/// Ends this process when the lifeline closes: as a stop signal would, and by force if that takes long.
fn hold(fd: RawFd) {
    // SAFETY: the number was passed by the parent, which made this process inherit the descriptor for
    // this one use; nothing else in this process knows it.
    let mut lifeline = unsafe { std::fs::File::from_raw_fd(fd) };
    std::thread::spawn(move || {
        // Nobody writes: this returns when the other end is gone, or at once if it is no pipe.
        let _ = lifeline.read(&mut [0; 1]);
        let _ = kill(Pid::this(), Signal::SIGTERM);
        std::thread::sleep(STOP_PATIENCE);
        std::process::exit(1);
    });
}

/// How long it may take to end in good order: sockets removed, the last counts sent.
const STOP_PATIENCE: Duration = Duration::from_secs(3);
const LAST_WORDS_PATIENCE: Duration = Duration::from_millis(50);
const SAID_BYTES_MAX: usize = 4096;
const SAID_LINES_MAX: usize = 5;
