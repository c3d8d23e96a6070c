//! A dataplane of one's own: a child of `run` or `up`, that ends with it whatever ends it.
//!
//! It is told where its controlplane is and how its guests are to be treated, and inherits the guest's
//! link and a lifeline: the reading end of a pipe that nobody writes to. When this process is gone,
//! killed or not, the kernel closes the other end, and the dataplane ends as if it had been asked to.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use vnet_dataplane::args::{Args, Cli};
use vnet_dataplane::config::{
    Config, ListenAt, ListenConfig, OwnListSettings, OwnPolicySettings, Problems, Transport, VmSettings,
    ZoneSettings, default_name, inherited,
};
use vnet_dataplane::front::{self, FrontReceiver, FrontSender};
use vnet_dataplane::inherit;
use vnet_dataplane::link::listen::is_stale as is_stale_socket;
use vnet_dataplane::run::LAST_WORDS;
use vnet_proto::model::ForwardListen;

use super::descriptors::inherit_only;
use crate::cmd::treat::Treatment;
use crate::failure::Failure;
use crate::output::text::safe;

/// What a dataplane is told at its start.
#[derive(Debug, Default)]
pub struct Settings {
    /// Its flags.
    pub args: Args,
    /// What its VMs bring along.
    pub treatment: Treatment,
    /// Its local zones, in order, in place of those of its flags and its default ones.
    pub zones: Option<Vec<ZoneSettings>>,
    /// How long its guests' resolvers wait; its own default if left out.
    pub resolver_patience: Option<Duration>,
    /// The link of its one guest, where it serves no socket.
    pub link: Option<OwnedFd>,
    /// Where its guests are captured, all of them.
    pub pcap: Option<OwnedFd>,
    /// Whether this process is its front: it hands over requests on its `--listen` sockets that are not its own,
    /// and opens tunnels ([`Dataplane::take_front`]).
    pub front: bool,
    /// What becomes of its log.
    pub log: DataplaneLog,
}

/// What becomes of a dataplane's log. Its last words, why it failed, are in [`DataplaneError::Ended`] and
/// nowhere else.
#[derive(Debug, Default)]
pub enum DataplaneLog {
    /// The last of it is kept, to be shown when it fails without a word: the terminal is the command's.
    #[default]
    Kept,
    /// Each line is handed over.
    Lines {
        /// How much it says, as `RUST_LOG` has it.
        directive: &'static str,
        /// Takes a line.
        line: fn(&str),
    },
}

/// A running dataplane.
#[derive(Debug)]
pub struct Dataplane {
    child: Child,
    /// Its process, also once it has ended.
    pid: Option<u32>,
    /// Closing it ends the dataplane.
    lifeline: Option<io::PipeWriter>,
    ready: pipe::Receiver,
    said: Arc<Mutex<Said>>,
    /// Hears what it says, until all of it is closed.
    listening: Option<JoinHandle<()>>,
    front: Option<(FrontSender, FrontReceiver)>,
    /// Where its sockets are to be, and whether it puts a new one there for each guest.
    socket_paths: Vec<(PathBuf, bool)>,
    /// Those that it made, which it removes itself, if it can.
    sockets: Vec<LeftSocket>,
}

/// A socket in the file system that the dataplane made. Dropping this, once that has ended, removes it, if
/// what is at its path still is that socket.
#[derive(Debug)]
struct LeftSocket {
    path: PathBuf,
    /// Device and inode; `None`: it puts a new one there for each guest.
    identity: Option<(u64, u64)>,
}

impl LeftSocket {
    /// The socket at a path, if one is there.
    fn at(path: &Path, is_renewed: bool) -> Option<Self> {
        let found = fs::symlink_metadata(path).ok()?;
        found.file_type().is_socket().then(|| Self {
            path: path.to_owned(),
            identity: (!is_renewed).then_some((found.dev(), found.ino())),
        })
    }
}

impl Drop for LeftSocket {
    fn drop(&mut self) {
        // Another that was started meanwhile has put its own there. One of datagrams is served as soon as it
        // is there.
        let is_left = match self.identity {
            Some(own) => {
                let found = fs::symlink_metadata(&self.path);
                found.is_ok_and(|found| (found.dev(), found.ino()) == own)
            }
            None => is_stale_socket(&self.path),
        };
        if is_left {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Why a dataplane did not start or did not stay.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// It could not be started.
    #[error("cannot start the dataplane: {0}")]
    Start(#[source] io::Error),
    /// It ended by itself.
    #[error("{}", ended(*.pid, *.status, .said))]
    Ended {
        /// The process that it was.
        pid: Option<u32>,
        /// How.
        status: ExitStatus,
        /// What is known of why.
        said: Said,
    },
}

/// What is known of why a dataplane ended, from what it wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Said {
    /// Its last words, a line each: why it failed, as it says itself.
    words: Vec<String>,
    /// The last lines of its log, where nobody else was told them.
    log: Vec<String>,
}

/// The one thing to say of an end: why it failed in its own words, else what ended it and where to look.
fn ended(pid: Option<u32>, status: ExitStatus, said: &Said) -> String {
    if !said.words.is_empty() {
        return said.words.join("\n  ");
    }
    let mut text = match status.signal() {
        Some(number) => {
            let name =
                Signal::try_from(number).map_or_else(|_| String::new(), |signal| format!(" ({signal})"));
            let pid = pid.map_or_else(String::new, |pid| format!(" for its pid {pid}"));
            let why = match Signal::try_from(number) {
                Ok(Signal::SIGKILL) => {
                    format!("look{pid} in the system's log (journalctl -k, dmesg): memory may have run out")
                }
                _ => format!("it crashed; look{pid} for what it left (coredumpctl), and report it"),
            };
            format!("the dataplane was killed by signal {number}{name}; if nobody here did that, {why}")
        }
        None => format!("the dataplane ended without saying why ({status})"),
    };
    for line in &said.log {
        text.push_str("\n  ");
        text.push_str(line);
    }
    text
}

impl Settings {
    /// Checks the flags as the dataplane will. `has_link` says that a link will be there by the time
    /// it starts. Gives the configuration, or adds every problem.
    pub fn check(&self, has_link: bool, problems: &mut Vec<String>) -> Option<Config> {
        match self.config(has_link) {
            Ok(config) => {
                // Looked at before anything is opened that could be taken for one.
                problems.extend(not_inherited(&config));
                Some(config)
            }
            Err(found) => {
                problems.extend(found.to_string().lines().map(|line| safe(line).into_owned()));
                None
            }
        }
    }

    /// The configuration as the dataplane will have it, but for the numbers of what it inherits.
    fn config(&self, has_link: bool) -> Result<Config, Problems> {
        let mut args = self.args.clone();
        if has_link {
            // The number is not known yet; any that is no standard stream passes the same checks.
            args.link_fd = Some(i32::MAX);
        }
        if self.front {
            args.front_fd = Some(i32::MAX - 1);
        }
        Config::new(&args, self.vm_settings(), &default_name())
    }

    /// Paths of sockets that it will make, and whether it puts a new one there for each guest.
    fn socket_paths(&self) -> Vec<(PathBuf, bool)> {
        // What is wrong with the flags it says itself.
        let Ok(config) = self.config(self.link.is_some()) else {
            return Vec::new();
        };
        let of_guests = config
            .listeners
            .into_iter()
            .filter_map(|listener| match listener.at {
                ListenAt::Unix(path) => Some((path, listener.transport == Transport::Vfkit)),
                _ => None,
            });
        let of_forwards = config
            .forwards
            .into_iter()
            .filter_map(|forward| match forward.listen {
                ForwardListen::Unix(path) => Some((path, false)),
                ForwardListen::Address(_) => None,
            });
        of_guests.chain(of_forwards).collect()
    }

    fn vm_settings(&self) -> VmSettings {
        let Treatment {
            document,
            rules,
            mode,
            ec2_metadata_access,
            ..
        } = &self.treatment;
        let own_policy = (document.is_some() || !rules.is_empty()).then(|| {
            let (source, lists) = match document {
                Some(document) => (document.source.clone(), document.lists.clone()),
                None => Default::default(),
            };
            OwnPolicySettings {
                document: document.as_ref().map(|document| document.text.clone()),
                source,
                rules: rules.clone(),
                lists: lists.into_iter().map(own_list).collect(),
            }
        });
        VmSettings {
            own_policy,
            mode: mode.map(|mode| mode.to_string()),
            ec2_metadata_access: *ec2_metadata_access,
            zones: self.zones.clone(),
            resolver_patience_ms: self
                .resolver_patience
                .map(|p| u64::try_from(p.as_millis()).unwrap_or(u64::MAX)),
            ..VmSettings::default()
        }
    }
}

/// What is wrong with the descriptors that the flags name.
fn not_inherited(config: &Config) -> impl Iterator<Item = String> {
    let missing = |listener: &ListenConfig| match listener.at {
        ListenAt::Fd(fd) if !inherit::is_inherited(fd) => Some(format!(
            "{} fd://{fd}: no such descriptor was inherited (open it for this program, as {fd}<>SOCKET does in a shell)",
            listener.transport.flag()
        )),
        _ => None,
    };
    config.listeners.iter().filter_map(missing)
}

fn own_list(list: vnet_proto::v1::PolicyList) -> OwnListSettings {
    OwnListSettings {
        path: list.path,
        sha256: list.sha256,
        content: list.content,
        size_bytes: list.size_bytes,
    }
}

impl Dataplane {
    /// Starts one.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn start(settings: Settings) -> Result<Self, DataplaneError> {
        let start = DataplaneError::Start;
        let socket_paths = settings.socket_paths();
        let program = super::own_executable().map_err(|e| start(io::Error::other(e)))?;
        let document = serde_json::to_vec(&settings.vm_settings()).map_err(|e| start(io::Error::other(e)))?;
        let (lifeline_end, lifeline) = io::pipe().map_err(start)?;
        let (settings_end, settings_writer) = io::pipe().map_err(start)?;
        let (ready, ready_end) = io::pipe().map_err(start)?;
        let ready = pipe::Receiver::from_owned_fd(ready.into()).map_err(start)?;
        let ready_end = OwnedFd::from(ready_end);
        let (front, front_end) = if settings.front {
            let (own, theirs) = front::pair().map_err(start)?;
            let opened = front::open(own, Arc::default()).map_err(start)?;
            (Some(opened), Some(theirs))
        } else {
            (None, None)
        };
        let (lifeline_end, settings_end) = (OwnedFd::from(lifeline_end), OwnedFd::from(settings_end));
        let args = Args {
            link_fd: settings.link.as_ref().map(|fd| fd.as_raw_fd()),
            vm_settings_fd: Some(settings_end.as_raw_fd()),
            exit_with_fd: Some(lifeline_end.as_raw_fd()),
            ready_fd: Some(ready_end.as_raw_fd()),
            pcap_fd: settings.pcap.as_ref().map(|fd| fd.as_raw_fd()),
            front_fd: front_end.as_ref().map(|fd| fd.as_raw_fd()),
            ..settings.args
        };
        // The guests' own sockets go to the dataplane and stay with nobody else, so that each side sees when
        // the other is gone.
        let sockets: Vec<OwnedFd> = inherited(&args)
            .map(inherit::take)
            .collect::<Result<_, _>>()
            .map_err(start)?;
        let stdio = |inherits: bool| if inherits { Stdio::inherit() } else { Stdio::null() };
        let has_stdio = !args.listen_stdio.is_empty();
        let mut command = std::process::Command::new(program);
        command
            .arg0("vnet-dataplane")
            .arg(super::DATAPLANE_ROLE)
            .args(flags(&args))
            .current_dir("/")
            .stdin(stdio(has_stdio))
            .stdout(stdio(has_stdio))
            .stderr(Stdio::piped())
            // Escapes of colour would be shown as text where its words are quoted.
            .env("NO_COLOR", "1")
            // Ctrl-C is for this process, which ends the dataplane when it is ready to.
            .process_group(0);
        let (directive, line) = match settings.log {
            // What went well is in the history.
            DataplaneLog::Kept => ("warn", None),
            DataplaneLog::Lines { directive, line } => (directive, Some(line)),
        };
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", directive);
        }
        let keep: Vec<&OwnedFd> = settings
            .link
            .iter()
            .chain([&lifeline_end, &settings_end, &ready_end])
            .chain(&front_end)
            .chain(&settings.pcap)
            .chain(&sockets)
            .collect();
        inherit_only(&mut command, &keep);
        let mut child = Command::from(command).kill_on_drop(true).spawn().map_err(start)?;
        let pid = child.id();
        // A policy may be longer than a pipe holds. A child that died early is told of by its end.
        std::thread::spawn(move || {
            let mut writer = settings_writer;
            let _ = writer.write_all(&document);
        });
        let said = Arc::default();
        let stderr = child.stderr.take();
        let listening = stderr.map(|stderr| tokio::spawn(listen(stderr, Arc::clone(&said), line)));
        Ok(Self {
            child,
            pid,
            lifeline: Some(lifeline),
            ready,
            said,
            listening,
            front,
            socket_paths,
            sockets: Vec::new(),
        })
    }

    /// The channel to it, once, where it was started with a front ([`Settings::front`]): what hands tunnels over,
    /// and what brings requests.
    pub fn take_front(&mut self) -> Option<(FrontSender, FrontReceiver)> {
        self.front.take()
    }

    /// Waits until everything that it was told to open listens; `false` if it ended before. Cancel safe.
    pub async fn ready(&mut self) -> bool {
        let mut byte = [0];
        matches!(self.ready.read(&mut byte).await, Ok(1))
    }

    /// Waits until it listens everywhere.
    ///
    /// # Errors
    /// What it said instead, or that it takes too long.
    pub async fn listens(&mut self) -> Result<(), Failure> {
        if tokio::time::timeout(READY_PATIENCE, self.ready()).await == Ok(true) {
            // One that is killed removes none of them.
            let paths = self.socket_paths.iter();
            self.sockets = paths
                .filter_map(|(path, is_renewed)| LeftSocket::at(path, *is_renewed))
                .collect();
            return Ok(());
        }
        let ended = tokio::time::timeout(END_PATIENCE, self.ended()).await;
        Err(Failure::Failed(match ended {
            Ok(error) => error.to_string(),
            Err(_) => format!(
                "the dataplane does not listen after {} s",
                READY_PATIENCE.as_secs()
            ),
        }))
    }

    /// Waits until it ends by itself. Cancel safe.
    pub async fn ended(&mut self) -> DataplaneError {
        match self.child.wait().await {
            Ok(status) => {
                self.hear_out().await;
                DataplaneError::Ended {
                    pid: self.pid,
                    status,
                    said: self.said.lock().unwrap_or_else(PoisonError::into_inner).clone(),
                }
            }
            Err(error) => DataplaneError::Start(error),
        }
    }

    /// Ends it: asked first, then made to.
    pub async fn stop(mut self) {
        drop(self.lifeline.take());
        if tokio::time::timeout(STOP_PATIENCE, self.child.wait())
            .await
            .is_err()
        {
            let _ = self.child.kill().await;
        }
        self.hear_out().await;
    }

    /// Waits for its last words, which may still be on their way through the pipe.
    async fn hear_out(&mut self) {
        if let Some(listening) = &mut self.listening {
            // Whatever else holds the pipe is not waited for.
            let _ = tokio::time::timeout(LAST_WORDS_PATIENCE, listening).await;
            self.listening = None;
        }
    }
}

/// Takes what it says line by line: each is handed over where that is wanted, or kept; its last words are
/// kept only.
async fn listen(mut stderr: tokio::process::ChildStderr, said: Arc<Mutex<Said>>, line: Option<fn(&str)>) {
    let mut chunk = [0; 1024];
    let mut begun = Vec::new();
    let hear = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        match (last_words(&text), line) {
            (Some(words), _) => keep(&mut said.words, words),
            (None, Some(line)) => line(&text),
            (None, None) => keep(&mut said.log, &text),
        }
    };
    while let Ok(length @ 1..) = stderr.read(&mut chunk).await {
        begun.extend_from_slice(&chunk[..length]);
        while let Some(end) = begun.iter().position(|byte| *byte == b'\n') {
            hear(&begun[..end]);
            begun.drain(..=end);
        }
        // A line without an end is no reason to grow.
        if begun.len() > LINE_BYTES_MAX {
            hear(&begun);
            begun.clear();
        }
    }
    if !begun.is_empty() {
        hear(&begun);
    }
}

/// What a line says, if it is of a dataplane's last words.
fn last_words(line: &str) -> Option<&str> {
    line.strip_prefix(LAST_WORDS)
}

fn keep(lines: &mut Vec<String>, line: &str) {
    lines.push(safe(line).into_owned());
    let excess = lines.len().saturating_sub(SAID_LINES_MAX);
    lines.drain(..excess);
}

/// The flags as a command line. The whole structure is taken apart, so that a flag that is added there
/// cannot be forgotten here.
fn flags(args: &Args) -> Vec<OsString> {
    let Args {
        controlplane,
        name,
        vm,
        labels,
        listen_qemu,
        listen_vfkit,
        listen,
        listen_bess,
        listen_vpnkit,
        vpnkit_macs,
        listen_stdio,
        link_fd,
        mtu,
        subnet,
        gateway,
        gateway_mac,
        host_alias,
        nat,
        virtual_ips,
        first_guest,
        ipv6_prefix,
        static_leases,
        dns,
        dns_search,
        zones,
        no_default_zones,
        publish,
        guest_api,
        front_fd,
        pcap_fd,
        pcap_limit_bytes,
        closed,
        vm_settings_fd,
        exit_with_fd,
        ready_fd,
    } = args;
    let number = |fd: &Option<i32>| fd.map(|fd| fd.to_string());
    let once = [
        ("controlplane", controlplane.clone()),
        ("name", name.clone()),
        ("vm", vm.clone()),
        ("link-fd", number(link_fd)),
        ("mtu", mtu.clone()),
        ("subnet", subnet.clone()),
        ("gateway", gateway.clone()),
        ("gateway-mac", gateway_mac.clone()),
        ("host-alias", host_alias.clone()),
        ("first-guest", first_guest.clone()),
        ("ipv6-prefix", ipv6_prefix.clone()),
        ("front-fd", number(front_fd)),
        ("pcap-fd", number(pcap_fd)),
        (
            "pcap-limit-bytes",
            pcap_limit_bytes.map(|bytes| bytes.to_string()),
        ),
        ("vm-settings-fd", number(vm_settings_fd)),
        ("exit-with-fd", number(exit_with_fd)),
        ("ready-fd", number(ready_fd)),
    ];
    let repeated = [
        ("label", labels),
        ("listen-qemu", listen_qemu),
        ("listen-vfkit", listen_vfkit),
        ("listen", listen),
        ("listen-bess", listen_bess),
        ("listen-vpnkit", listen_vpnkit),
        ("vpnkit-mac", vpnkit_macs),
        ("listen-stdio", listen_stdio),
        ("nat", nat),
        ("virtual-ip", virtual_ips),
        ("static-lease", static_leases),
        ("dns", dns),
        ("dns-search", dns_search),
        ("zone", zones),
        ("publish", publish),
    ];
    let closed = closed.iter().map(|at| ("closed", at.to_string()));
    let once = once
        .into_iter()
        .filter_map(|(flag, value)| value.map(|value| (flag, value)));
    let repeated = repeated
        .into_iter()
        .flat_map(|(flag, values)| values.iter().cloned().map(move |v| (flag, v)));
    let switches = [("guest-api", *guest_api), ("no-default-zones", *no_default_zones)];
    let switches = switches.into_iter().filter(|(_, on)| *on);
    // One word each, so that a value that begins with a dash stays a value.
    once.chain(repeated)
        .chain(closed)
        .map(|(flag, value)| OsString::from(format!("--{flag}={value}")))
        .chain(switches.map(|(flag, _)| OsString::from(format!("--{flag}"))))
        .collect()
}

/// This process as the dataplane.
pub(super) fn main(arguments: Vec<OsString>) -> ExitCode {
    // Started by the kernel's own link it would be called `exe`, where it is told who listens somewhere.
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_name(c"vnet-dataplane");
    super::parsed(arguments, |cli: Cli| vnet_dataplane::main(cli.args))
}

/// How long binding its sockets may take.
const READY_PATIENCE: Duration = Duration::from_secs(10);
/// How long one that did not get there may take to end, which says why.
const END_PATIENCE: Duration = Duration::from_secs(1);
/// How long it may take to end in good order: sockets removed, the last counts sent.
const STOP_PATIENCE: Duration = Duration::from_secs(3);
const LAST_WORDS_PATIENCE: Duration = Duration::from_millis(200);
const LINE_BYTES_MAX: usize = 4096;
const SAID_LINES_MAX: usize = 5;

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;
    use clap::Parser as _;

    #[test]
    fn the_one_thing_said_of_an_end_is_why_it_failed_or_what_killed_it() {
        let said = |words: &[&str], log: &[&str]| Said {
            words: words.iter().map(ToString::to_string).collect(),
            log: log.iter().map(ToString::to_string).collect(),
        };
        let exit = ExitStatus::from_raw(1 << 8);
        let debug = ["2026-07-21T10:00:00.000001Z DEBUG x: y"];
        assert_eq!(
            ended(
                Some(7),
                exit,
                &said(&["--listen-qemu unix:///q.sock cannot be opened"], &debug)
            ),
            "--listen-qemu unix:///q.sock cannot be opened"
        );
        assert_eq!(
            ended(Some(7), ExitStatus::from_raw(9), &said(&[], &[])),
            "the dataplane was killed by signal 9 (SIGKILL); if nobody here did that, look for its pid 7 in the \
             system's log (journalctl -k, dmesg): memory may have run out"
        );
        assert_eq!(
            ended(Some(7), ExitStatus::from_raw(6), &said(&[], &[])),
            "the dataplane was killed by signal 6 (SIGABRT); if nobody here did that, it crashed; look for its pid 7 \
             for what it left (coredumpctl), and report it"
        );
        // As of a panic, where nobody was told its log.
        assert_eq!(
            ended(Some(7), exit, &said(&[], &["thread panicked"])),
            "the dataplane ended without saying why (exit status: 1)\n  thread panicked"
        );
    }

    #[tokio::test]
    async fn last_words_are_kept_and_all_else_is_handed_over_at_once() {
        static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let tell = |line: &str| TOLD.lock().unwrap().push(line.to_owned());
        for (line, kept) in [(Some(tell as fn(&str)), vec![]), (None, vec!["a log", "unended"])] {
            let mut child = Command::new("sh")
                .args([
                    "-c",
                    "printf 'a log\\nvnet-dataplane: one\\nvnet-dataplane: two\\nunended' >&2",
                ])
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let said = Arc::default();
            listen(child.stderr.take().unwrap(), Arc::clone(&said), line).await;
            child.wait().await.unwrap();
            let said = said.lock().unwrap();
            assert_eq!(said.words, ["one", "two"]);
            assert_eq!(said.log, kept);
        }
        assert_eq!(*TOLD.lock().unwrap(), ["a log", "unended"]);
    }

    #[test]
    fn the_sockets_to_be_left_are_those_of_guests_and_of_forwards() {
        let args = Cli::try_parse_from([
            "vnet-dataplane",
            "--controlplane=unix:///s.sock",
            "--listen-qemu=unix:///q.sock?name=a",
            "--listen-vfkit=unixgram:///v.sock",
            "--listen=tcp://127.0.0.1:0",
            "--publish=unix:///f.sock:80",
            "--guest-api",
        ])
        .unwrap()
        .args;
        let settings = Settings {
            args,
            front: true,
            ..Settings::default()
        };
        let problems = settings.config(false).map_err(|problems| problems.to_string());
        assert_eq!(problems.err(), None);
        let expected = [("/q.sock", false), ("/v.sock", true), ("/f.sock", false)];
        assert_eq!(
            settings.socket_paths(),
            expected.map(|(path, is_renewed)| (PathBuf::from(path), is_renewed))
        );
    }

    #[test]
    fn a_socket_that_is_left_is_removed_and_a_successors_is_not() {
        let path = std::env::temp_dir().join(format!("vnetctl-left-{}.sock", std::process::id()));
        let _ = fs::remove_file(&path);
        assert!(LeftSocket::at(&path, false).is_none());
        drop(UnixListener::bind(&path).unwrap());
        let left = LeftSocket::at(&path, false).unwrap();
        drop(left);
        assert!(!path.exists());

        let first = UnixListener::bind(&path).unwrap();
        let left = LeftSocket::at(&path, false).unwrap();
        // Kept, so that its number is nobody else's.
        fs::rename(&path, path.with_extension("old")).unwrap();
        let second = UnixListener::bind(&path).unwrap();
        drop(left);
        assert!(path.exists(), "it is another's");
        drop((first, second));
        fs::remove_file(path.with_extension("old")).unwrap();
        fs::remove_file(&path).unwrap();

        // Of datagrams there is another one for each guest.
        let first = UnixDatagram::bind(&path).unwrap();
        let left = LeftSocket::at(&path, true).unwrap();
        fs::remove_file(&path).unwrap();
        let second = UnixDatagram::bind(&path).unwrap();
        drop(left);
        assert!(path.exists(), "it is served");
        let left = LeftSocket::at(&path, true).unwrap();
        drop((first, second));
        drop(left);
        assert!(!path.exists());
    }

    #[test]
    fn flags_read_back_as_they_were() {
        let line = [
            "vnet-dataplane",
            "--controlplane=unix:///run/s.sock",
            "--name=n",
            "--vm=web",
            "--label=a=b",
            "--label=c=d",
            "--listen-qemu=unix:///q.sock?name=x",
            "--listen-vfkit=unixgram:///v.sock",
            "--listen=a",
            "--listen-bess=b",
            "--listen-vpnkit=c",
            "--vpnkit-mac=u=m",
            "--listen-stdio=d",
            "--link-fd=7",
            "--mtu=65520",
            "--subnet=10.0.0.0/24",
            "--gateway=10.0.0.1",
            "--gateway-mac=5a:94:ef:e4:0c:dd",
            "--host-alias=none",
            "--nat=10.0.0.7=127.0.0.1",
            "--nat=10.0.0.8=::1",
            "--virtual-ip=10.0.0.6",
            "--first-guest=10.0.0.9",
            "--ipv6-prefix=fd12:3456:789a:1::/64",
            "--static-lease=5a:94:ef:00:00:02=10.0.0.9",
            "--dns=192.0.2.53",
            "--dns-search=lan",
            "--zone=z:a=10.0.0.2",
            "--no-default-zones",
            "--publish=8080:80",
            "--front-fd=10",
            "--guest-api",
            "--pcap-fd=11",
            "--pcap-limit-bytes=1000",
            "--closed=127.0.0.1:8080",
            "--closed=[::1]:8081",
            "--vm-settings-fd=8",
            "--exit-with-fd=9",
        ];
        let args = Cli::try_parse_from(line).unwrap().args;

        let again = std::iter::once(OsString::from("vnet-dataplane")).chain(flags(&args));
        let again = Cli::try_parse_from(again).unwrap().args;

        assert_eq!(format!("{args:?}"), format!("{again:?}"));
        assert_eq!(flags(&args).len(), line.len() - 1);
    }

    #[test]
    fn what_vms_bring_along_is_written_as_the_dataplane_reads_it() {
        let treatment = Treatment {
            rules: vec!["allow tcp 192.0.2.7:80".to_owned()],
            mode: Some(vnet_proto::model::Mode::Ask),
            ec2_metadata_access: true,
            ..Treatment::default()
        };
        let settings = Settings {
            treatment,
            resolver_patience: Some(Duration::from_secs(30)),
            zones: Some(vec![ZoneSettings {
                name: ".".to_owned(),
                ..ZoneSettings::default()
            }]),
            ..Settings::default()
        };

        let text = serde_json::to_vec(&settings.vm_settings()).unwrap();
        let read = VmSettings::read(text.as_slice()).unwrap();

        assert_eq!(read.mode.as_deref(), Some("ask"));
        assert!(read.ec2_metadata_access);
        assert_eq!(read.resolver_patience_ms, Some(30_000));
        assert_eq!(read.zones.as_ref().unwrap()[0].name, ".");
        assert_eq!(read.own_policy.clone().unwrap().rules, ["allow tcp 192.0.2.7:80"]);
        let no_document = read.own_policy.as_ref().map(|own| own.document.clone());
        assert_eq!(no_document, Some(None), "rules alone bring no document");
        assert_eq!(
            Settings::default().vm_settings(),
            VmSettings::default(),
            "nothing is brought: open, as under gvproxy"
        );
    }
}
