//! `up`: a dataplane for VMs, in the foreground, and the user's controlplane if none answers.

use clap::Args;
use std::path::{Path, PathBuf};

use super::attend::{Attendant, Seen, command_line, dataplane_name, say};
use super::forward::ports;
use super::questions::Questions;
use super::select::size;
use super::treat::{Problems, TreatArgs};
use crate::client::Connection;
use crate::failure::Failure;
use crate::launch::{
    Dataplane, DataplaneArgs, DataplaneConfig, DataplaneError, DataplaneLog, Forward, ListenAt, ListenConfig,
    Settings, enough_descriptors, open_pcap, session_url,
};
use crate::output::{self, text::safe};
use crate::signals::Ending;

/// Arguments of `up`.
#[derive(Debug, Args)]
#[command(
    long_about = "Serve VMs: a dataplane, and your controlplane if none answers.\n\n\
        Each guest that connects gets an address by DHCP, the gateway's DNS, and the way out that its \
        policy leaves open. What is given here applies to this dataplane's VMs alone. Runs until \
        interrupted, then removes its sockets.",
    after_help = "Examples:\n  vnetctl up --listen-qemu unix:///tmp/qemu.sock --secure-mode\n  \
        vnetctl up --listen-vfkit unixgram:///tmp/vfkit.sock --vm mac -p 2222:22\n  \
        vnetctl up --listen-qemu 'unix:///tmp/a.sock?name=a' --listen-qemu 'unix:///tmp/b.sock?name=b' --allow 'tcp 192.0.2.7:443'\n  \
        vnetctl up --listen-qemu unix:///tmp/qemu.sock --pcap /tmp/vm.pcapng\n\n\
        QEMU connects with: -netdev stream,id=n0,addr.type=unix,addr.path=/tmp/qemu.sock -device virtio-net,netdev=n0",
    mut_arg("controlplane", |arg| arg.hide(true))
)]
pub struct UpArgs {
    /// Capture all packets of the VMs to this file, in pcapng: a file, which is emptied, a named pipe, or /dev/stdout.
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,
    /// End the capture, and nothing else, before its file has more than SIZE bytes, as 500MB or 1GiB [default: no
    /// limit]
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "pcap")]
    pub pcap_limit: Option<u64>,
    /// How the guests are treated.
    #[command(flatten)]
    pub treat: TreatArgs,
    /// The dataplane's flags.
    #[command(flatten)]
    pub dataplane: DataplaneArgs,
}

/// Runs it, until it is interrupted.
///
/// # Errors
/// What is wrong with the options, and what fails to start.
pub fn execute(args: UpArgs, connection: Connection) -> Result<(), Failure> {
    let mut problems = Problems::default();
    let UpArgs {
        pcap,
        pcap_limit,
        treat,
        dataplane: mut flags,
    } = args;
    flags.pcap_limit_bytes = pcap_limit;
    if flags.controlplane.is_some() {
        problems
            .usage
            .push("--controlplane is vnet-dataplane's; name a controlplane with --server".to_owned());
    }
    if !flags.listen_stdio.is_empty() && treat.network_policy.as_deref() == Some(Path::new("-")) {
        problems.usage.push(
            "--network-policy - and --listen-stdio both read standard input; read the policy from a file"
                .to_owned(),
        );
        // It would be read, and waited for.
        problems.none()?;
        return Ok(());
    }
    let treatment = treat.check(&mut problems);
    flags.controlplane = Some(session_url(&connection.server()?));
    let name = flags.name.get_or_insert(dataplane_name("up")?).clone();
    let settings = Settings {
        args: flags,
        treatment,
        log: DataplaneLog::Lines {
            // What went well is in the history.
            directive: "warn",
            line: |line| output::say(safe(line)),
        },
        ..Settings::default()
    };
    let config = settings.check(false, &mut problems.usage);
    problems.none()?;
    for warning in &settings.treatment.warnings {
        output::say(warning);
    }
    let Some(config) = config else { return Ok(()) };
    enough_descriptors(&config)?;
    crate::cli::runtime()?.block_on(serve(settings, pcap, &config, name, connection))
}

async fn serve(
    mut settings: Settings,
    pcap: Option<PathBuf>,
    config: &DataplaneConfig,
    name: String,
    connection: Connection,
) -> Result<(), Failure> {
    let mut ending = Ending::open()?;
    if let Some(path) = pcap {
        let waiting = || output::say(safe(&format!("vnet: waiting for a reader of {}", path.display())));
        let stdio = config.stdio.as_ref().map(|_| "--listen-stdio");
        let opened = open_pcap(&path, stdio, waiting);
        settings.pcap = tokio::select! {
            () = ending.next() => return Ok(()),
            opened = opened => Some(opened.map_err(|error| {
                Failure::Failed(safe(&format!("--pcap {} {error}", path.display())).into_owned())
            })?),
        };
    }
    // The dataplane needs its sessions' listener from the start on.
    connection.open().await?;
    let mut dataplane = Dataplane::start(settings).map_err(|e| Failure::Failed(e.to_string()))?;
    if let Err(failure) = dataplane.listens().await {
        dataplane.stop().await;
        return Err(failure);
    }
    let command = command_line(&connection);
    for line in greeting(config, &command) {
        output::say(line);
    }

    let mut questions = Questions::new(false, command);
    let mut attendant = Attendant::start(connection, name);
    let result = loop {
        let seen = tokio::select! {
            () = ending.next() => break Ok(()),
            error = dataplane.ended() => break match error {
                DataplaneError::Ended { status, .. } if status.success() && ends_with_its_guests(config) => {
                    output::say("vnet: the last guest is gone");
                    Ok(())
                }
                error => Err(Failure::Failed(error.to_string())),
            },
            seen = attendant.next() => seen,
        };
        let acts = match seen {
            Seen::Began => questions.begin_again(),
            Seen::Pending(change) => questions.change(&change),
            Seen::Vm(_) | Seen::Gone(_) | Seen::Synced => Vec::new(),
            Seen::Lost(why) => {
                output::say(format!(
                    "vnet: no controlplane, so nothing new is let out; trying again ({})",
                    safe(&why)
                ));
                Vec::new()
            }
        };
        say(acts);
    };
    dataplane.stop().await;
    result
}

/// Whether the dataplane may end by itself: its guests came with it, and others cannot.
fn ends_with_its_guests(config: &DataplaneConfig) -> bool {
    let has_come = |listener: &ListenConfig| matches!(listener.at, ListenAt::Fd(_));
    config.stdio.is_some() || config.listeners.iter().all(has_come)
}

fn greeting(config: &DataplaneConfig, command: &str) -> Vec<String> {
    let mut lines: Vec<String> = config
        .listeners
        .iter()
        .map(|listener| {
            safe(&format!(
                "vnet: serving VM {} for {} at {}",
                listener.vm.name,
                listener.transport.word(),
                listener.url()
            ))
            .into_owned()
        })
        .collect();
    if let Some(vm) = &config.stdio {
        lines.push(format!(
            "vnet: serving VM {} on standard input and output",
            vm.name
        ));
    }
    let mut rest = &config.forwards[..];
    while let Some(first) = rest.first() {
        let follows = |(place, forward): &(usize, &Forward)| {
            u16::try_from(*place)
                .ok()
                .and_then(|ports| first.further(ports))
                .as_ref()
                == Some(*forward)
        };
        let count = rest.iter().enumerate().take_while(follows).count().max(1);
        let keeps = if first.keep_client {
            ", with the client's address"
        } else {
            ""
        };
        let (listen, target) = (first.listen.to_string(), first.target.to_string());
        let (listen, target) = (ports(&listen, count), ports(&target, count));
        lines.push(
            safe(&format!(
                "vnet: forwarding {} {listen} -> {target}{keeps}",
                first.protocol
            ))
            .into_owned(),
        );
        rest = &rest[count..];
    }
    lines.push(format!(
        "vnet: what is held is listed by: {command} pending list; stop with Ctrl-C"
    ));
    lines
}
