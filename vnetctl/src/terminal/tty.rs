//! The user's terminal itself: which streams are one, its mode and size, and putting it back.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, Once};

use nix::errno::Errno;
use nix::sys::termios::{FlushArg, SetArg, Termios, cfmakeraw, tcflush, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

use super::canvas::{COLUMNS_MIN, ROWS_MIN};
use super::output::Size;

/// Which of stdin, stdout and stderr are terminals.
pub fn standard_streams() -> [bool; 3] {
    [
        io::stdin().is_terminal(),
        io::stdout().is_terminal(),
        io::stderr().is_terminal(),
    ]
}

/// The device files of the terminals among the standard streams. A command that may open them by name
/// could read the user's answers.
pub fn device_paths() -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = [
        nix::unistd::ttyname(io::stdin()),
        nix::unistd::ttyname(io::stdout()),
        nix::unistd::ttyname(io::stderr()),
    ]
    .into_iter()
    .flatten()
    .collect();
    paths.sort();
    paths.dedup();
    paths
}

/// Puts the real terminal back into the mode in which it was found, if this process changed it and is in
/// the foreground. Harmless at any time.
pub fn restore() {
    let mut changed = changed();
    let Some((terminal, mode)) = changed.as_ref() else {
        return;
    };
    // In the background it would be the shell's mode that is changed. What was changed stays known.
    if is_foreground(terminal.as_fd()) && tcsetattr(terminal, SetArg::TCSADRAIN, mode).is_ok() {
        *changed = None;
    }
}

/// The terminal whose mode was changed, and the mode in which it was found.
static CHANGED: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

fn changed() -> MutexGuard<'static, Option<(OwnedFd, Termios)>> {
    CHANGED.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The terminal that the user sees and, if stdin is one too, types in.
#[derive(Debug)]
pub(crate) struct Real {
    input: Option<OwnedFd>,
    output: OwnedFd,
}

impl Real {
    /// Finds it among the standard streams.
    pub(crate) fn open() -> io::Result<Real> {
        let input = io::stdin()
            .is_terminal()
            .then(|| io::stdin().as_fd().try_clone_to_owned())
            .transpose()?;
        let output = if io::stdout().is_terminal() {
            io::stdout().as_fd().try_clone_to_owned()?
        } else if io::stderr().is_terminal() {
            io::stderr().as_fd().try_clone_to_owned()?
        } else if let Some(input) = &input {
            input.try_clone()?
        } else {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "no standard stream is a terminal",
            ));
        };
        Ok(Real { input, output })
    }

    pub(crate) fn has_keyboard(&self) -> bool {
        self.input.is_some()
    }

    pub(crate) fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn output(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }

    /// Whether keys are for this process group.
    pub(crate) fn is_foreground(&self) -> bool {
        self.input().is_some_and(is_foreground)
    }

    /// Passes every key on as it is pressed. Undone by [`restore`].
    pub(crate) fn make_raw(&self) -> io::Result<()> {
        let Some(input) = self.input() else { return Ok(()) };
        restore_at_exit();
        let mut changed = changed();
        let found = match changed.take() {
            // Changed already; it is the first mode that counts.
            Some((_, mode)) => mode,
            None => tcgetattr(input)?,
        };
        let mut raw = found.clone();
        cfmakeraw(&mut raw);
        *changed = Some((input.try_clone_to_owned()?, found));
        tcsetattr(input, SetArg::TCSADRAIN, &raw)?;
        Ok(())
    }

    /// Gives a pty the mode that this terminal had before it was changed.
    pub(crate) fn copy_mode_to(&self, pty: BorrowedFd<'_>) -> io::Result<()> {
        let mode = match changed().as_ref() {
            Some((_, mode)) => mode.clone(),
            None => tcgetattr(self.input().unwrap_or(self.output()))?,
        };
        Ok(tcsetattr(pty, SetArg::TCSANOW, &mode)?)
    }

    /// Throws away what was typed and not read yet.
    pub(crate) fn discard_input(&self) {
        if let Some(input) = self.input() {
            let _ = tcflush(input, FlushArg::TCIFLUSH);
        }
    }

    /// How many rows there are; 0 where that is not known.
    pub(crate) fn rows(&self) -> u16 {
        self.window().map_or(0, |window| window.ws_row)
    }

    /// The size, if it is one in which a row can be reserved.
    pub(crate) fn reservable(&self) -> Option<Size> {
        let window = self.window().ok()?;
        let large = window.ws_row >= ROWS_MIN && window.ws_col >= COLUMNS_MIN;
        (large && self.has_keyboard()).then_some((window.ws_row, window.ws_col))
    }

    fn window(&self) -> nix::Result<libc::winsize> {
        let mut size = libc::winsize {
            ws_row: 0,
            ws_col: 0,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCGWINSZ writes the winsize that it is given.
        Errno::result(unsafe { libc::ioctl(self.output.as_raw_fd(), libc::TIOCGWINSZ as _, &raw mut size) })?;
        Ok(size)
    }

    /// Gives a pty the size of this terminal's window, less a row where that is reserved; its foreground processes
    /// are told by the kernel.
    pub(crate) fn copy_size_to(&self, pty: BorrowedFd<'_>) -> io::Result<()> {
        let mut size = self.window()?;
        if self.reservable().is_some() {
            size.ws_ypixel -= size.ws_ypixel / size.ws_row;
            size.ws_row -= 1;
        }
        // SAFETY: TIOCSWINSZ reads the winsize that it is given.
        Errno::result(unsafe { libc::ioctl(pty.as_raw_fd(), libc::TIOCSWINSZ as _, &raw const size) })?;
        Ok(())
    }
}

fn is_foreground(terminal: BorrowedFd<'_>) -> bool {
    tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp())
}

/// Restores the terminal on a panic, before its message, and on `exit`, which drops nothing.
fn restore_at_exit() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // The thread that panics may hold the lock; then `Drop` restores.
            if let Ok(changed) = CHANGED.try_lock()
                && let Some((terminal, mode)) = changed.as_ref()
                && is_foreground(terminal.as_fd())
            {
                let _ = tcsetattr(terminal, SetArg::TCSANOW, mode);
            }
            before(info);
        }));
        extern "C" fn at_exit() {
            restore();
        }
        // SAFETY: registers a function that takes a lock and calls tcsetattr; `exit` may run it.
        unsafe { libc::atexit(at_exit) };
    });
}
