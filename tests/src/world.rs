//! One user's world on a stage: directories of their own, both sides of the wire, and `vnetctl`.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use vnetctl::sandbox::stage::{NetNs, Stage};

use crate::{Ended, Running, binaries, descendants, eventually, process};

/// A stage with a user on it.
#[derive(Debug)]
pub struct World {
    stage: Option<Stage>,
    directory: PathBuf,
}

impl World {
    /// Sets the scene.
    ///
    /// # Panics
    /// When the temporary directory cannot be written to.
    pub fn new(stage: Stage) -> World {
        Self::with(Some(stage))
    }

    /// A user on this machine as it is, without a stage. What it starts becomes this process's child.
    ///
    /// # Panics
    /// When the temporary directory cannot be written to.
    pub fn unstaged() -> World {
        nix::sys::prctl::set_child_subreaper(true).expect("any process may reap");
        Self::with(None)
    }

    fn with(stage: Option<Stage>) -> World {
        // Short: sockets' paths have a limit.
        let directory = PathBuf::from(format!("/tmp/vnet-t{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        for part in ["", "run", "state", "home", "work", "tmp"] {
            let mut builder = fs::DirBuilder::new();
            builder
                .mode(0o700)
                .create(directory.join(part))
                .expect("a test may write to /tmp");
        }
        World { stage, directory }
    }

    /// Where the user is.
    ///
    /// # Panics
    /// Without a stage.
    pub fn host(&self) -> &NetNs {
        &self.stage.as_ref().expect("there is a stage").host
    }

    /// Where the servers are.
    ///
    /// # Panics
    /// Without a stage.
    pub fn internet(&self) -> &NetNs {
        &self.stage.as_ref().expect("there is a stage").internet
    }

    /// The directory that commands start in, which is empty.
    pub fn work(&self) -> PathBuf {
        self.directory.join("work")
    }

    /// `XDG_RUNTIME_DIR`.
    pub fn runtime_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// `XDG_STATE_HOME`.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The API's socket of the user's controlplane.
    pub fn control_socket(&self) -> PathBuf {
        self.runtime_dir().join("vnet/control.sock")
    }

    /// Writes a file where commands start, and gives its path.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.work().join(name);
        fs::write(&path, text).expect("a test may write to its directory");
        path
    }

    /// A program (one of ours by its bare name) in the user's environment and nothing else's.
    pub fn program(&self, name: impl AsRef<OsStr>) -> Command {
        let name = name.as_ref();
        let mut command = match name.to_str() {
            Some("vnetctl" | "vnet-controlplane" | "vnet-dataplane") => {
                Command::new(binaries::binary(&name.to_string_lossy()))
            }
            _ => Command::new(name),
        };
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env_clear()
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .env("LANG", "C")
            .env("TERM", "dumb")
            .env("HOME", self.directory.join("home"))
            .env("XDG_RUNTIME_DIR", self.runtime_dir())
            .env("XDG_STATE_HOME", self.state_dir())
            .env("TMPDIR", self.directory.join("tmp"))
            .current_dir(self.work());
        command
    }

    /// `vnetctl` with these words.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = self.program("vnetctl");
        command.args(words);
        command
    }

    /// `gvproxy` with these words: a link of that name to `vnetctl`.
    ///
    /// # Panics
    /// When there can be no link.
    pub fn gvproxy(&self, words: &[&str]) -> Command {
        let link = self.directory.join("gvproxy");
        if !link.exists() {
            std::os::unix::fs::symlink(binaries::binary("vnetctl"), &link).expect("a test may make a link");
        }
        let mut command = self.program(link);
        command.args(words);
        command
    }

    /// Runs `vnetctl` with these words to its end, whatever it is.
    pub fn try_vnetctl(&self, words: &[&str]) -> Ended {
        Running::start(self.command(words)).wait()
    }

    /// Runs `vnetctl` with these words, which must succeed, and gives what it prints.
    ///
    /// # Panics
    /// When it fails.
    pub fn vnetctl(&self, words: &[&str]) -> String {
        let ended = self.try_vnetctl(words);
        assert_eq!(ended.code, 0, "vnetctl {words:?}: {ended:?}");
        ended.stdout
    }

    /// What a list (`&["vm", "list"]`) or another command prints with `-o json`.
    ///
    /// # Panics
    /// When it fails, and when that is not JSON.
    pub fn json(&self, words: &[&str]) -> Value {
        let text = self.vnetctl(&[words, &["-o", "json"]].concat());
        serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{words:?} prints no JSON: {error}\n{text}"))
    }

    /// A list's items.
    ///
    /// # Panics
    /// When it is no list.
    pub fn list(&self, words: &[&str]) -> Vec<Value> {
        match self.json(words) {
            Value::Array(items) => items,
            other => panic!("{words:?} prints no list: {other}"),
        }
    }

    /// The pending requests.
    pub fn pending(&self) -> Vec<Value> {
        self.list(&["pending", "list"])
    }

    /// Waits for the first pending request and gives it.
    pub fn first_pending(&self) -> Value {
        let mut first = None;
        eventually("something is asked", || {
            first = self.pending().into_iter().next();
            first.is_some()
        });
        first.unwrap_or_default()
    }

    /// Waits for the first pending request and gives its id.
    pub fn first_pending_id(&self) -> String {
        id(&self.first_pending())
    }

    /// Starts `vnetctl run FLAGS -- COMMAND`, with no terminal.
    pub fn run(&self, flags: &[&str], command: &[&str]) -> Running {
        Running::start(self.command(&[&["run"], flags, &["--"], command].concat()))
    }

    /// The program that stands in for guests, and makes load.
    pub fn load(&self) -> Command {
        self.program(binaries::binary("vnet-load"))
    }

    /// A guest behind QEMU's framing that runs a command. Its MAC address is the one whose address gvproxy keeps.
    pub fn guest(&self, socket: &Path, command: &[&str]) -> Running {
        let mut guest = self.load();
        guest.args(["guest", "--mac", FIRST_MAC, "--socket"]).arg(socket);
        guest.arg("--").args(command);
        Running::start(guest)
    }

    /// The same, with a script for bash.
    pub fn guest_script(&self, socket: &Path, script: &str) -> Running {
        self.guest(socket, &["bash", "-c", script])
    }

    /// `gvproxy` with these flags and a socket for QEMU, which is there.
    pub fn gvproxy_for_qemu(&self, flags: &[&str]) -> (Running, PathBuf) {
        let socket = self.runtime_dir().join("vm.sock");
        let url = format!("unix://{}", socket.display());
        let mut gvproxy = Running::start(self.gvproxy(&[flags, &["-listen-qemu", &url]].concat()));
        gvproxy.complains("waiting for clients");
        (gvproxy, socket)
    }

    /// Serves VMs, the first of which is `web`: `vnetctl up` with these flags, and the socket for guests.
    pub fn up(&self, flags: &[&str]) -> (Running, String) {
        let socket = self.runtime_dir().join("vm.sock").display().to_string();
        let url = format!("unix://{socket}");
        let words = [&["up", "--vm", "web", "--listen-qemu", &url], flags].concat();
        let mut up = Running::start(self.command(&words));
        up.complains("serving VM web");
        (up, socket)
    }

    /// Runs `vnetctl run FLAGS -- sh -c SCRIPT` to its end.
    pub fn script(&self, flags: &[&str], script: &str) -> Ended {
        self.run(flags, &["sh", "-c", script]).wait()
    }

    /// The processes of the user's that run and have this in their command line.
    pub fn processes(&self, with: &str) -> Vec<i32> {
        let of = |(pid, line): (i32, String)| line.contains(with).then_some(pid);
        descendants().into_iter().filter_map(of).collect()
    }

    /// Waits until nothing runs but the controlplane, which serves on for a minute, and checks that
    /// nothing else is left either: no socket but its own, no file, no interface, no mount.
    ///
    /// # Panics
    /// When something is left.
    pub fn is_clean(&self) {
        let others = || -> Vec<_> {
            let is_other = |(_, line): &(i32, String)| !line.contains("__controlplane");
            descendants().into_iter().filter(is_other).collect()
        };
        let mut left = Vec::new();
        let began = std::time::Instant::now();
        while began.elapsed() < process::PATIENCE {
            left = others();
            if left.is_empty() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(left.is_empty(), "left behind: {left:?}");
        let expected = ["control.sock", "session.sock", "control.sock.lock", "start.lock"];
        for entry in walk(&self.runtime_dir())
            .into_iter()
            .chain(walk(&self.directory.join("home")))
            .chain(walk(&self.directory.join("tmp")))
        {
            let name = entry
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let known = expected.contains(&name.as_str()) || name.ends_with(".lock");
            assert!(known, "left behind: {}", entry.display());
        }
        for entry in walk(&self.state_dir()) {
            let name = entry
                .strip_prefix(self.state_dir())
                .unwrap_or(&entry)
                .to_string_lossy();
            let kind = fs::symlink_metadata(&entry).map(|m| m.file_type().is_file());
            assert!(
                kind.unwrap_or(true) && STATE.contains(&&*name),
                "left behind: {}",
                entry.display()
            );
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let own = self.directory.to_string_lossy();
        assert!(!mounts.contains(&*own), "left behind: {mounts}");
        let links = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
        let mut names: Vec<_> = links
            .lines()
            .filter_map(|l| l.split_once(':'))
            .map(|(name, _)| name.trim())
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["host0", "lo"], "interfaces of the host");
    }

    /// Ends the user's controlplane in the orderly way, and waits until it is gone.
    pub fn stop_controlplane(&self) {
        for pid in self.processes("__controlplane") {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        eventually("the controlplane ends", || {
            self.processes("__controlplane").is_empty()
        });
    }

    /// Opens a directory of the world to every user.
    ///
    /// # Panics
    /// When it is not there.
    pub fn open_to_all(&self, path: &Path) {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).expect("it is there");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.state_dir().join("vnet/controlplane.log");
            eprintln!(
                "--- the controlplane's log\n{}",
                fs::read_to_string(log).unwrap_or_default()
            );
        }
        process::kill_descendants();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The `id` of a listed thing.
///
/// # Panics
/// When it has none.
pub fn id(item: &Value) -> String {
    item["id"]
        .as_str()
        .unwrap_or_else(|| panic!("{item} has no id"))
        .to_owned()
}

/// The MAC address that gvproxy keeps its first guest's address for.
pub const FIRST_MAC: &str = "5a:94:ef:e4:0c:ee";

/// What a controlplane keeps.
const STATE: [&str; 5] = [
    "vnet/state.db",
    "vnet/state.db-wal",
    "vnet/state.db-shm",
    "vnet/state.db.lock",
    "vnet/controlplane.log",
];

/// Every file below a directory, directories aside.
fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(walk(&path));
        } else {
            found.push(path);
        }
    }
    found
}
