//! Processes that a test starts: what they print, how they end, and what is left of them.

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// How long anything may take that is to happen; generous, for a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A process in the background, with what it has printed so far.
#[derive(Debug)]
pub struct Running {
    child: Child,
    began: Instant,
    stdout: Arc<Mutex<Vec<u8>>>,
    stderr: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

/// How a process ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code, or 128 and the number of the signal that ended it.
    pub code: i32,
    /// All that it printed.
    pub stdout: String,
    /// All that it complained of.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Running {
    /// Starts a command with no input.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(mut command: Command) -> Running {
        command.stdin(Stdio::null());
        Self::start_with_input(command)
    }

    /// Starts a command whose input has been chosen.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_with_input(mut command: Command) -> Running {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let readers = vec![
            collect(child.stdout.take(), &stdout),
            collect(child.stderr.take(), &stderr),
        ];
        Running {
            child,
            began: Instant::now(),
            stdout,
            stderr,
            readers,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(i32::MAX)
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        text(&self.stdout)
    }

    /// What it has complained of so far.
    pub fn stderr(&self) -> String {
        text(&self.stderr)
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("it has not been waited for");
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// Never, for a child of this process.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is a child").is_some()
    }

    /// Waits until it prints this on stderr.
    ///
    /// # Panics
    /// When it ends first, or takes too long.
    pub fn complains(&mut self, of: &str) -> String {
        self.until(&format!("stderr says {of:?}"), |run| run.stderr().contains(of));
        self.stderr()
    }

    /// Waits until it prints this on stdout.
    ///
    /// # Panics
    /// When it ends first, or takes too long.
    pub fn prints(&mut self, what: &str) -> String {
        self.until(&format!("stdout has {what:?}"), |run| run.stdout().contains(what));
        self.stdout()
    }

    fn until(&mut self, what: &str, holds: impl Fn(&Running) -> bool) {
        let began = Instant::now();
        while !holds(self) {
            let ended = self.has_ended();
            if (ended && !holds(self)) || began.elapsed() > PATIENCE {
                let how = if ended { "ended" } else { "waited in vain" };
                panic!(
                    "{how} before {what}\nstdout: {}\nstderr: {}",
                    self.stdout(),
                    self.stderr()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end within [`PATIENCE`].
    pub fn wait(self) -> Ended {
        self.wait_for(PATIENCE)
    }

    /// Waits for its end at most so long.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait_for(mut self, patience: Duration) -> Ended {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is a child") {
                break status;
            }
            assert!(
                self.began.elapsed() < patience,
                "it does not end\nstdout: {}\nstderr: {}",
                self.stdout(),
                self.stderr()
            );
            thread::sleep(Duration::from_millis(5));
        };
        let took = self.began.elapsed();
        eventually("nobody holds its output open after its end", || {
            self.readers.iter().all(JoinHandle::is_finished)
        });
        Ended {
            code: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
            stdout: self.stdout(),
            stderr: self.stderr(),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(from: Option<impl Read + Send + 'static>, into: &Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    let into = Arc::clone(into);
    thread::spawn(move || {
        let Some(mut from) = from else { return };
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut chunk) {
            into.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend_from_slice(&chunk[..length]);
        }
    })
}

fn text(bytes: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&bytes.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
}

/// Waits until a condition holds.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "still not so: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Every process below this one that still runs, with its command line. As this process reaps the
/// orphans of a stage, nothing that a test started can be elsewhere.
pub fn descendants() -> Vec<(i32, String)> {
    descendants_of(Pid::this().as_raw())
}

/// Every process below another that still runs, with its command line.
pub fn descendants_of(own: i32) -> Vec<(i32, String)> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        // proc_pid_stat(5): the name may hold anything, so what follows is found from its end.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        if let (Some(state), Some(Ok(parent))) = (fields.next(), fields.next().map(str::parse::<i32>)) {
            parents.push((pid, parent, state == "Z"));
        }
    }
    let mut found = vec![own];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(
            parents
                .iter()
                .filter(|(_, p, _)| *p == parent)
                .map(|(pid, ..)| *pid),
        );
        next += 1;
    }
    let is_alive = |pid: &i32| parents.iter().any(|(p, _, zombie)| p == pid && !zombie);
    found
        .into_iter()
        .filter(|pid| *pid != own && is_alive(pid))
        .map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            (pid, String::from_utf8_lossy(&line).replace('\0', " "))
        })
        // One without a command line has ended since it was looked at.
        .filter(|(_, line)| !line.is_empty())
        .collect()
}

/// Ends every process below this one.
pub fn kill_descendants() {
    for _ in 0..100 {
        let left = descendants();
        if left.is_empty() {
            return;
        }
        for (pid, _) in left {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
        }
        thread::sleep(Duration::from_millis(10));
    }
}
