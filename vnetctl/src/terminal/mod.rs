//! Between a command with a pty of its own and the user's terminal: bytes both ways, the size of the
//! window, suspension, and questions that the user answers with a key.
//!
//! The command never holds the real terminal: every standard stream that is one is replaced by its pty
//! ([`standard_streams`]). What it writes is filtered (`output`), so that it can neither leave the terminal in a
//! state in which a question is not seen, nor have it type. What comes from the terminal is told apart (`keys`):
//! keys, and what a command may have the terminal send.
//!
//! A question is shown on lines of its own, while what the command prints waits (up to [`MAX_HELD_BYTES`], then the
//! command waits) and follows after the answer. What was typed before it, and in its first [`GRACE`], is thrown away.
//! It is answered by one key that comes alone.
//!
//! A program that takes the whole screen has one row less than the terminal (`canvas`). The last row is vnet's
//! and says what is asked; Control-] opens the question there. Keys go to the question only while it is open.
//!
//! Every line of vnet's own begins with a mark that is made anew for each run and said before the command starts
//! ([`Terminal::mark`]). The command cannot read the screen, so what it prints to look like a question lacks it.
//!
//! The real terminal's mode is restored when [`Terminal`] goes, on a panic, on `exit`, and by
//! [`restore`]. Signals are not caught here: whoever runs the command does that, and ends in good order.
//!
//! When stdin is no terminal, no keys are read: nobody is asked and the command gets none.

mod canvas;
mod keys;
mod output;
mod relay;
mod tty;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;

pub use self::keys::Key;
pub use self::tty::{device_paths, restore, standard_streams};

use self::relay::{Request, Sender};
use self::tty::Real;

/// How long a question is shown before a key answers it.
pub const GRACE: Duration = Duration::from_millis(500);
/// How much of the command's output waits while a question is shown.
pub const MAX_HELD_BYTES: usize = 1 << 20;
/// How long the last output may take to reach the real terminal.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// The user's terminal, joined to a command's pty.
#[derive(Debug)]
pub struct Terminal {
    sender: Sender,
    real: Arc<Real>,
    /// The pty's front side, for its size and mode.
    pty: OwnedFd,
    mark: String,
    /// Keys are not read: the front is suspended, or in the background.
    paused: Arc<AtomicBool>,
    finished: Option<oneshot::Receiver<()>>,
}

impl Terminal {
    /// Joins the user's terminal to a pty, whose front side is given: copies mode and size to it, puts
    /// the real terminal into raw mode if the user types there and this process is in the
    /// foreground, and relays from now on.
    ///
    /// # Errors
    /// No standard stream is a terminal, or the terminal refused.
    pub fn attach(pty: OwnedFd) -> io::Result<Terminal> {
        let real = Arc::new(Real::open()?);
        real.copy_mode_to(pty.as_fd())?;
        let paused = Arc::new(AtomicBool::new(!real.is_foreground()));
        if !paused.load(Ordering::Relaxed) {
            real.make_raw()?;
        }
        let mark = mark()?;
        let (sender, finished) = relay::start(
            pty.try_clone()?,
            real.clone(),
            paused.clone(),
            mark.clone(),
            real.reservable(),
        )
        .inspect_err(|_| restore())?;
        let terminal = Terminal {
            sender,
            real,
            pty,
            mark,
            paused,
            finished: Some(finished),
        };
        terminal.resize();
        Ok(terminal)
    }

    /// Whether a question can be answered here.
    pub fn can_prompt(&self) -> bool {
        self.real.has_keyboard()
    }

    /// What every line of vnet's own begins with, for as long as this lasts.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// Shows a question on a line of its own and waits for a key. `None` when none can come: no keyboard,
    /// the terminal is gone, or the command ended. Questions are shown one after the other; dropping
    /// the future takes the question back.
    ///
    /// What a guest chose must have gone through [`safe`](crate::output::text::safe).
    pub async fn prompt(&self, question: &str) -> Option<Key> {
        let (reply, answer) = oneshot::channel();
        let _wake_when_dropped = self.sender.waker();
        self.sender.send(Request::Prompt {
            question: question.to_owned(),
            reply,
        });
        answer.await.ok()
    }

    /// Prints a line of vnet's own, on a line of its own.
    pub fn say(&self, line: &str) {
        self.sender.send(Request::Say(line.to_owned()));
    }

    /// Gives the command keys, as if they had been typed.
    pub fn type_in(&self, bytes: &[u8]) {
        self.sender.send(Request::TypeIn(bytes.to_vec()));
    }

    /// Copies the size of the real window to the pty, less the row that is reserved. To be called on `SIGWINCH`.
    pub fn resize(&self) {
        self.sender.send(Request::Resize(self.real.reservable()));
        // A terminal without a size (a serial line) leaves the pty without one too.
        let _ = self.real.copy_size_to(self.pty.as_fd());
    }

    /// Gives the real terminal back before this process is suspended.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
        self.sender.wake();
        restore();
    }

    /// Takes the real terminal again, if this process is in the foreground. To be called on `SIGCONT`.
    pub fn resume(&self) {
        if self.real.is_foreground() && self.real.make_raw().is_ok() {
            self.paused.store(false, Ordering::SeqCst);
        }
        self.sender.wake();
        self.resize();
    }

    /// Prints what the command has printed last, once it has ended, and restores the real terminal.
    pub async fn finish(mut self) {
        self.sender.send(Request::Finish);
        if let Some(finished) = self.finished.take() {
            let _ = tokio::time::timeout(FINISH_TIMEOUT, finished).await;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.sender.send(Request::Stop);
        restore();
    }
}

/// A mark that nobody can know beforehand, of letters and digits that are not taken for each other.
fn mark() -> io::Result<String> {
    const FROM: &[u8; 32] = b"abcdefghjkmnpqrstuvwxyz23456789+";
    let mut random = [0; MARK_LENGTH];
    getrandom::fill(&mut random)
        .map_err(|error| io::Error::other(format!("no randomness to be had: {error}")))?;
    let mark: String = random
        .iter()
        .map(|byte| char::from(FROM[usize::from(*byte) % FROM.len()]))
        .collect();
    Ok(format!("[{mark}]"))
}

/// One in a million is guessed right.
const MARK_LENGTH: usize = 4;
