//! A dataplane of one's own: a child of `run` or `up`, that ends with it whatever ends it.
//!
//! It is told where its controlplane is and how its guests are to be treated, and inherits the guest's
//! link and a lifeline: the reading end of a pipe that nobody writes to. When this process is gone,
//! killed or not, the kernel closes the other end, and the dataplane ends as if it had been asked to.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use vnet_dataplane::args::{Args, Cli};
use vnet_dataplane::config::{
    Config, ListenAt, ListenConfig, OwnListSettings, OwnPolicySettings, VmSettings, ZoneSettings,
    default_name, inherited,
};
use vnet_dataplane::front::{self, FrontReceiver, FrontSender};
use vnet_dataplane::inherit;

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

/// What becomes of a dataplane's log.
#[derive(Debug, Default)]
pub enum DataplaneLog {
    /// The last of it is kept, to be shown when it fails: the terminal is the command's.
    #[default]
    Kept,
    /// It writes to this process's stderr itself, as under `up`.
    Stderr,
    /// Each line is handed over, and the last are kept too.
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
    /// Closing it ends the dataplane.
    lifeline: Option<io::PipeWriter>,
    ready: pipe::Receiver,
    said: Arc<Mutex<Vec<u8>>>,
    front: Option<(FrontSender, FrontReceiver)>,
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

impl Settings {
    /// Checks the flags as the dataplane will. `has_link` says that a link will be there by the time
    /// it starts. Gives the configuration, or adds every problem.
    pub fn check(&self, has_link: bool, problems: &mut Vec<String>) -> Option<Config> {
        let mut args = self.args.clone();
        if has_link {
            // The number is not known yet; any that is no standard stream passes the same checks.
            args.link_fd = Some(i32::MAX);
        }
        if self.front {
            args.front_fd = Some(i32::MAX - 1);
        }
        match Config::new(&args, self.vm_settings(), &default_name()) {
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
            .stderr(match settings.log {
                DataplaneLog::Stderr => Stdio::inherit(),
                DataplaneLog::Kept | DataplaneLog::Lines { .. } => Stdio::piped(),
            })
            // Escapes of colour would be shown as text where its words are quoted.
            .env("NO_COLOR", "1")
            // Ctrl-C is for this process, which ends the dataplane when it is ready to.
            .process_group(0);
        let (directive, line) = match settings.log {
            // What went well is in the history.
            DataplaneLog::Kept | DataplaneLog::Stderr => ("warn", None),
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
        // A policy may be longer than a pipe holds. A child that died early is told of by its end.
        std::thread::spawn(move || {
            let mut writer = settings_writer;
            let _ = writer.write_all(&document);
        });
        let said = Arc::default();
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(listen(stderr, Arc::clone(&said), line));
        }
        Ok(Self {
            child,
            lifeline: Some(lifeline),
            ready,
            said,
            front,
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
                // Its last words may still be on their way through the pipe.
                tokio::time::sleep(LAST_WORDS_PATIENCE).await;
                DataplaneError::Ended {
                    status,
                    said: self.said(),
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
    }

    /// The last of what it said.
    fn said(&self) -> String {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&said).into_owned();
        let lines: Vec<String> = text.lines().map(|line| format!("\n  {}", safe(line))).collect();
        lines[lines.len().saturating_sub(SAID_LINES_MAX)..].concat()
    }
}

/// Keeps the last of what it says, and hands each line over where that is wanted.
async fn listen(mut stderr: tokio::process::ChildStderr, said: Arc<Mutex<Vec<u8>>>, line: Option<fn(&str)>) {
    let mut chunk = [0; 1024];
    let mut begun = Vec::new();
    while let Ok(length @ 1..) = stderr.read(&mut chunk).await {
        if let Some(line) = line {
            begun.extend_from_slice(&chunk[..length]);
            while let Some(end) = begun.iter().position(|byte| *byte == b'\n') {
                line(&String::from_utf8_lossy(&begun[..end]));
                begun.drain(..=end);
            }
            // A line without an end is no reason to grow.
            if begun.len() > SAID_BYTES_MAX {
                line(&String::from_utf8_lossy(&begun));
                begun.clear();
            }
        }
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        said.extend_from_slice(&chunk[..length]);
        let excess = said.len().saturating_sub(SAID_BYTES_MAX);
        said.drain(..excess);
    }
    if let Some(line) = line.filter(|_| !begun.is_empty()) {
        line(&String::from_utf8_lossy(&begun));
    }
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
    super::parsed(arguments, |cli: Cli| vnet_dataplane::main(cli.args))
}

/// How long binding its sockets may take.
const READY_PATIENCE: Duration = Duration::from_secs(10);
/// How long one that did not get there may take to end, which says why.
const END_PATIENCE: Duration = Duration::from_secs(1);
/// How long it may take to end in good order: sockets removed, the last counts sent.
const STOP_PATIENCE: Duration = Duration::from_secs(3);
const LAST_WORDS_PATIENCE: Duration = Duration::from_millis(50);
const SAID_BYTES_MAX: usize = 4096;
const SAID_LINES_MAX: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

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
