//! A controlplane at the user's own sockets, started by hand, so that none is started by itself.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::{Ended, Running, World, eventually};

/// One that asks where no rule decides; what it is to remember is in [`Controlplane::store`].
#[derive(Debug)]
pub struct Controlplane {
    process: Running,
    ends_by: Signal,
    session_url: String,
}

impl Controlplane {
    /// Starts it and waits until it listens; `ends_by` is how it will be ended.
    pub fn start(world: &World, ends_by: Signal) -> Controlplane {
        Self::start_with(world, ends_by, "")
    }

    /// One that says at its end what it counted.
    pub fn start_logging(world: &World, ends_by: Signal) -> Controlplane {
        Self::start_with(world, ends_by, "vnet_controlplane=debug")
    }

    fn start_with(world: &World, ends_by: Signal, log: &str) -> Controlplane {
        let directory = world.runtime_dir().join("vnet");
        // There already, where it is started again.
        let _ = DirBuilder::new().mode(0o700).create(&directory);
        let at = |name: &str| format!("unix://{}", directory.join(name).display());
        let mut command = world.program("vnet-controlplane");
        command.args([
            "--listen",
            &at("control.sock"),
            "--session-listen",
            &at("session.sock"),
        ]);
        let store = format!("sqlite:{}", Self::store(world).display());
        command.args(["--secure-mode", "--store", &store]);
        if !log.is_empty() {
            command.env("RUST_LOG", log);
        }
        let process = Running::start(command);
        let socket = world.control_socket();
        eventually("the controlplane listens", || {
            UnixStream::connect(&socket).is_ok()
        });
        Controlplane {
            process,
            ends_by,
            session_url: at("session.sock"),
        }
    }

    /// Its store's file.
    pub fn store(world: &World) -> PathBuf {
        world.state_dir().join("state.db")
    }

    /// Where dataplanes find it.
    pub fn session_url(&self) -> &str {
        &self.session_url
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Ends it, and starts another in its place.
    #[must_use]
    pub fn restart(self, world: &World) -> Controlplane {
        let ends_by = self.ends_by;
        self.end();
        Controlplane::start(world, ends_by)
    }

    /// Ends it, if nothing else has.
    pub fn end(self) -> Ended {
        self.process.signal(self.ends_by);
        self.process.wait()
    }
}

/// How many misses a controlplane counted, as it says at its end where it logs ([`Controlplane::start_logging`]).
///
/// # Panics
/// When it does not say.
pub fn misses(ended: &Ended) -> u64 {
    let line = ended
        .stderr
        .lines()
        .find(|line| line.contains("vnet_controlplane_misses_total"));
    let line = line.unwrap_or_else(|| panic!("it does not say: {}", ended.stderr));
    let (_, value) = line
        .rsplit_once("value=")
        .unwrap_or_else(|| panic!("no number: {line:?}"));
    let digits: String = value.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no number: {line:?}"))
}
