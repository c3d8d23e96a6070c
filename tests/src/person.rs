//! A person at a real terminal: a pty whose other end a program has as its controlling terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};

use crate::PATIENCE;

/// Someone who types and reads.
#[derive(Debug)]
pub struct Person {
    child: Child,
    screen: File,
    seen: String,
}

impl Person {
    /// Starts a command at a terminal of its own.
    ///
    /// # Panics
    /// When there is no terminal to be had.
    pub fn start(command: &Command) -> Person {
        Self::at(command, None)
    }

    /// Starts a command at a terminal of this size.
    ///
    /// # Panics
    /// When there is no terminal to be had.
    pub fn start_sized(command: &Command, rows: u16, columns: u16) -> Person {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Self::at(command, Some(size))
    }

    fn at(command: &Command, size: Option<Winsize>) -> Person {
        let pty = openpty(size.as_ref(), None).expect("the system has ptys");
        // Whoever inherits this end keeps the terminal alive.
        fcntl(&pty.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("a descriptor has flags");
        let stdio = || Stdio::from(pty.slave.try_clone().expect("a descriptor can be copied"));
        let mut session = Command::new("setsid");
        session
            .args(["--ctty", "--wait"])
            // Who runs the tests in the background has them ignore what a terminal sends.
            .args(["env", "--default-signal=INT,QUIT"])
            .arg(command.get_program())
            .args(command.get_args())
            .env_clear();
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                session.env(name, value);
            }
        }
        if let Some(directory) = command.get_current_dir() {
            session.current_dir(directory);
        }
        let child = session
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .expect("setsid (package util-linux) starts it");
        Person {
            child,
            screen: File::from(pty.master),
            seen: String::new(),
        }
    }

    /// Types.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn types(&mut self, keys: &str) {
        self.screen
            .write_all(keys.as_bytes())
            .expect("the terminal is there");
    }

    /// Waits until this is on the screen, and gives all that has been.
    ///
    /// # Panics
    /// When it does not come.
    pub fn sees(&mut self, what: &str) -> &str {
        let began = Instant::now();
        while !self.seen.contains(what) {
            assert!(
                began.elapsed() < PATIENCE,
                "{what:?} is not on the screen: {:?}",
                self.seen
            );
            self.look();
        }
        &self.seen
    }

    /// What has been on the screen so far counts no more.
    pub fn forgets(&mut self) {
        self.seen.clear();
    }

    /// Closes the terminal's window.
    pub fn goes_away(mut self) {
        drop(std::mem::replace(
            &mut self.screen,
            File::open("/dev/null").expect("it is there"),
        ));
        let _ = self.child.wait();
    }

    /// Waits for the command's end; gives its exit code and all that was on the screen.
    ///
    /// # Panics
    /// When it does not end.
    pub fn leaves(mut self) -> (Option<i32>, String) {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is a child") {
                while self.look() {}
                return (status.code(), std::mem::take(&mut self.seen));
            }
            assert!(began.elapsed() < PATIENCE, "it does not end: {:?}", self.seen);
            self.look();
        }
    }

    /// Reads what has come; false if nothing has.
    fn look(&mut self) -> bool {
        let mut fds = [PollFd::new(self.screen.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(50u16)).unwrap_or(0);
        if ready == 0 {
            return false;
        }
        let mut chunk = [0; 4096];
        match self.screen.read(&mut chunk) {
            Ok(length @ 1..) => {
                self.seen.push_str(&String::from_utf8_lossy(&chunk[..length]));
                true
            }
            // EIO: nobody has the other end open any more.
            _ => {
                std::thread::sleep(Duration::from_millis(10));
                false
            }
        }
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
