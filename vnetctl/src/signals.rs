//! The signals that end what serves until it is ended: SIGINT, SIGTERM, and SIGHUP, which is none where whoever started
//! this process had it ignored, as `nohup` has (signal(7): an ignored one stays so over execve).

use std::io;

use nix::sys::signal::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// Waited for from when this is opened.
pub struct Ending {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
}

impl Ending {
    /// From now on they end nothing by themselves.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn open() -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::Failed(format!("cannot wait for signals: {error}"));
        let open = |kind| signal(kind).map_err(failed);
        Ok(Self {
            hangup: match is_ignored(Number::SIGHUP).map_err(failed)? {
                true => None,
                false => Some(open(SignalKind::hangup())?),
            },
            interrupt: open(SignalKind::interrupt())?,
            terminate: open(SignalKind::terminate())?,
        })
    }

    /// Waits for one.
    pub async fn next(&mut self) {
        let hung_up = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hung_up => {}
        }
    }
}

/// Whether a signal is ignored now.
fn is_ignored(number: Number) -> io::Result<bool> {
    let mut found = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is set, and what is there is written to a place that is large enough. `nix` cannot ask
    // without setting.
    let asked = unsafe { libc::sigaction(number as libc::c_int, std::ptr::null(), found.as_mut_ptr()) };
    if asked != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was written.
    Ok(unsafe { found.assume_init() }.sa_sigaction == libc::SIG_IGN)
}
