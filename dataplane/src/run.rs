//! A running dataplane: from a checked configuration to its end.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::Args;
use crate::config::{Config, ControlplaneUrl, ListenAt, Transport, VmConfig, VmSettings, default_name};
use crate::descriptors::Descriptors;
use crate::egress::resolver::{Resolver, ResolverConfig, Upstreams};
use crate::egress::way::{ANYWHERE, has_way};
use crate::engine::discovery::Ipv6Config;
use crate::engine::flow::FLOWS_MAX;
use crate::engine::gateway::dhcp::DhcpConfig;
use crate::engine::gateway::dns::zones::Zones;
use crate::forward::{ForwardError, Forwards};
use crate::guards::{Guards, HostAddresses, Watcher, follow};
use crate::inherit;
use crate::leases::{LEASE_TIME, LeaseConfig, Leases};
use crate::link::Link;
use crate::link::listen::{self, SocketFile};
use crate::link::packet::PacketLink;
use crate::message::{Report, Router};
use crate::metrics::Metrics;
use crate::network::{GuestSpec, Network, NetworkConfig};
use crate::session::{self, Commands, Controlplane, Identity, SessionConfig, SessionEnd};

/// Reports that wait for the session.
const REPORTS_MAX: usize = 65_536;
/// How long a flow is held before a controlplane has said otherwise.
const HOLD: std::time::Duration = std::time::Duration::from_secs(30);
/// How long guests and the session may take to end.
const LEAVE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);
/// The host's resolver configuration.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Why a dataplane could not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// An inherited descriptor is not there.
    #[error("descriptor {fd}, named by {flag}, was not inherited")]
    Descriptor {
        /// Which.
        fd: i32,
        /// The flag that names it.
        flag: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A guest socket cannot be opened.
    #[error("VM socket {at} cannot be opened{}", remedy(.source))]
    Listen {
        /// Which.
        at: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A forward cannot be opened.
    #[error("what --publish asks for cannot be forwarded")]
    Forward(#[source] ForwardError),
    /// The host's addresses cannot be followed, so its guards would not hold.
    #[error("the host's addresses cannot be followed")]
    Guards(#[source] io::Error),
    /// The system has no threads, descriptors or random numbers left.
    #[error("the system refuses what a dataplane needs")]
    System(#[source] io::Error),
    /// The session ended for good.
    #[error(transparent)]
    Session(SessionEnd),
}

/// What helps where a socket cannot be opened.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ", as something listens there; stop it, or listen elsewhere",
        io::ErrorKind::NotFound => ", as its directory is not there; make it, or listen elsewhere",
        io::ErrorKind::PermissionDenied => "; listen where this user may",
        _ => "",
    }
}

/// The program `vnet-dataplane`, from its flags to its exit status: 0 done, 1 failed, 2 usage.
pub fn main(args: Args) -> ExitCode {
    start_log();
    let settings = match settings(&args) {
        Ok(settings) => settings,
        Err(error) => return fail(&*error, 1),
    };
    let config = match Config::new(&args, settings, &default_name()) {
        Ok(config) => config,
        Err(problems) => {
            say(&problems.to_string());
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    match runtime.block_on(run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

fn settings(args: &Args) -> Result<VmSettings, Box<dyn std::error::Error>> {
    let Some(fd) = args.vm_settings_fd else {
        return Ok(VmSettings::default());
    };
    let descriptor = take("--vm-settings-fd", fd)?;
    Ok(VmSettings::read(std::fs::File::from(descriptor))?)
}

fn fail(error: &dyn std::error::Error, status: u8) -> ExitCode {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    say(&format!("vnet-dataplane: {text}"));
    ExitCode::from(status)
}

/// The last words. If nobody can read them, the exit code still says as much.
fn say(text: &str) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // A log that is set already (by a test) stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // What cannot be written is lost. Its own complaint would be an `eprintln!`, which panics then.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()))
        .try_init();
}

fn take(flag: &'static str, fd: i32) -> Result<std::os::fd::OwnedFd, RunError> {
    inherit::take(fd).map_err(|source| RunError::Descriptor { fd, flag, source })
}

/// Runs until a signal, the end of the lifeline or of an inherited link, or a refusal of the
/// controlplane.
///
/// # Errors
/// [`RunError`].
pub async fn run(config: Config) -> Result<(), RunError> {
    let descriptors = Descriptors::of_process();
    let metrics = Arc::new(Metrics::default());
    let lifeline = config
        .exit_with_fd
        .map(|fd| take("--exit-with-fd", fd))
        .transpose()?;
    let ready = config.ready_fd.map(|fd| take("--ready-fd", fd)).transpose()?;
    let controlplane = match &config.controlplane {
        ControlplaneUrl::Unix(path) => Controlplane::Unix(path.clone()),
        ControlplaneUrl::Fd(fd) => Controlplane::Inherited(take("--controlplane", *fd)?.into()),
    };

    // The watch begins before the first look, so that no change falls in between.
    let watcher = Watcher::open().map_err(RunError::Guards)?;
    let host = HostAddresses::enumerate().map_err(RunError::Guards)?;
    let guards = Arc::new(Guards::new(host, []));
    guards.set_ipv6(has_way(ANYWHERE));

    let (reports, receiver) = mpsc::channel(REPORTS_MAX);
    let network = make_network(
        &config,
        Arc::clone(&guards),
        descriptors.clone(),
        Arc::clone(&metrics),
        reports.clone(),
    );
    let forwards = Forwards::new(
        Arc::clone(&network) as Arc<dyn Router>,
        Arc::clone(&metrics),
        descriptors,
        tokio::runtime::Handle::current(),
    );
    network.set_forwards(forwards.clone());
    let _closing = Closing(forwards.clone());

    let mut boot_id = [0; 16];
    getrandom::fill(&mut boot_id).map_err(|e| RunError::System(io::Error::other(e.to_string())))?;
    let session = session::run(
        SessionConfig {
            controlplane,
            identity: Identity {
                dataplane: config.name.clone(),
                boot_id,
                network: config.network.name.clone(),
                subnet: config.network.subnet,
                subnet_ipv6: config.network.ipv6,
                gateway: config.network.gateway,
                host_alias: config.network.host_alias,
            },
            guards: Arc::clone(&guards),
            metrics: Arc::clone(&metrics),
        },
        receiver,
        Arc::clone(&network) as Arc<dyn Router>,
        Commands {
            forwards: forwards.clone(),
            zones: Arc::clone(&network) as Arc<dyn session::Zones>,
        },
    );
    let follow = follow(
        watcher,
        Arc::clone(&guards),
        Arc::clone(&metrics),
        reports.clone(),
        Arc::clone(&network) as Arc<dyn Router>,
    );

    forwards
        .expose(config.forwards.clone())
        .map_err(RunError::Forward)?;
    let files = open_listeners(&config, &network, &guards)?;
    let link_gone = open_link(&config, &network)?;

    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::System)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::System)?;
    tracing::info!(dataplane = %config.name, "ready");
    if let Some(ready) = ready {
        // Who does not read it any more has no use for it.
        let _ = std::fs::File::from(ready).write_all(b"ready\n");
    }
    let mut session = std::pin::pin!(session);
    let session_end = tokio::select! {
        end = &mut session => Some(end),
        result = follow => {
            // Stale guards would open the host's new addresses.
            return result.map_err(RunError::Guards);
        }
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        () = lifeline_end(lifeline) => None,
        _ = link_gone => None,
    };
    // No new guests; those there are end and say so, and the session ends behind the last of them.
    drop(files);
    forwards.close();
    network.stop();
    let session_end = match session_end {
        Some(end) => end,
        None => {
            let leave = async {
                // It cannot be closed: the session is still polled here.
                let _ = reports.send(Report::End).await;
                std::future::pending().await
            };
            tokio::select! {
                end = session => end,
                () = leave => SessionEnd::Finished,
                () = tokio::time::sleep(LEAVE_PATIENCE) => SessionEnd::Finished,
            }
        }
    };
    for line in metrics.render().lines().filter(|line| !line.starts_with('#')) {
        tracing::debug!(metric = line, "counted");
    }
    match session_end {
        SessionEnd::Finished => Ok(()),
        end => Err(RunError::Session(end)),
    }
}

/// Closes the forwards however the dataplane ends, so that no file of a socket stays behind.
struct Closing(Forwards);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

async fn lifeline_end(lifeline: Option<std::os::fd::OwnedFd>) {
    match lifeline {
        Some(lifeline) => {
            if let Err(error) = inherit::closed(lifeline).await {
                tracing::warn!(%error, "the lifeline cannot be followed; ending");
            }
        }
        None => std::future::pending().await,
    }
}

fn make_network(
    config: &Config,
    guards: Arc<Guards>,
    descriptors: Descriptors,
    metrics: Arc<Metrics>,
    reports: mpsc::Sender<Report>,
) -> Arc<Network> {
    let net = &config.network;
    let mut zones = Zones::new();
    for zone in &net.zones {
        if let Err(error) = zones.merge(zone.clone()) {
            tracing::warn!(%error, "zone left out");
        }
    }
    let leases = Leases::new(LeaseConfig {
        subnet: net.subnet,
        reserved: std::iter::once(net.gateway).chain(net.host_alias).collect(),
        fixed: net.static_leases.iter().copied().collect(),
        lease_time: LEASE_TIME,
    });
    let ipv6 = net.ipv6.map(|prefix| Ipv6Config::new(prefix, net.search.clone()));
    let resolver = Resolver::new(ResolverConfig {
        upstreams: if net.resolvers.is_empty() {
            Upstreams::Host(PathBuf::from(RESOLV_CONF))
        } else {
            Upstreams::Fixed(net.resolvers.clone())
        },
        never: std::iter::once(net.gateway.into())
            .chain(ipv6.iter().map(|i| i.gateway.into()))
            .collect(),
        in_flight_max: crate::egress::resolver::IN_FLIGHT_MAX,
        total_time: crate::egress::resolver::TOTAL_TIME,
    });
    let shared = NetworkConfig {
        gateway: net.gateway,
        gateway_mac: net.gateway_mac,
        subnet: net.subnet,
        host_alias: net.host_alias,
        ipv6,
        mtu_bytes: net.mtu_bytes.into(),
        dhcp: DhcpConfig {
            gateway: net.gateway,
            subnet: net.subnet,
            dns: vec![net.gateway],
            mtu_bytes: net.mtu_bytes,
            search_domains: net.search.clone(),
            lease_time: LEASE_TIME,
        },
        hold: HOLD,
        flows_max: FLOWS_MAX,
        descriptors,
        metrics,
    };
    Network::new(
        shared,
        leases,
        zones,
        guards,
        resolver,
        tokio::runtime::Handle::current(),
        reports,
    )
}

fn open_listeners(
    config: &Config,
    network: &Arc<Network>,
    guards: &Guards,
) -> Result<Vec<SocketFile>, RunError> {
    let mut files = Vec::new();
    for listener in &config.listeners {
        let refused = |source| RunError::Listen {
            at: listener.at.to_string(),
            source,
        };
        let spec = guest_spec(&listener.vm);
        match (&listener.at, listener.transport) {
            (ListenAt::Unix(path), Transport::Qemu) => {
                files.push(listen::stream_unix(network, path, spec).map_err(refused)?);
            }
            (ListenAt::Unix(path), Transport::Vfkit) => {
                files.push(listen::datagram(network, path, spec).map_err(refused)?);
            }
            (ListenAt::Tcp(address), _) => {
                // Where it really listens, port 0 replaced: closed to guests.
                guards.add_listener(listen::stream_tcp(network, *address, spec).map_err(refused)?);
            }
        }
        tracing::info!(at = %listener.at, "waiting for VMs");
    }
    Ok(files)
}

/// The inherited link, if there is one: what is received when it is gone.
fn open_link(
    config: &Config,
    network: &Arc<Network>,
) -> Result<std::pin::Pin<Box<dyn Future<Output = ()> + Send>>, RunError> {
    let Some((fd, vm)) = &config.link else {
        return Ok(Box::pin(std::future::pending()));
    };
    let descriptor = take("--link-fd", *fd)?;
    inherit::set_nonblocking(&descriptor).map_err(RunError::System)?;
    let (gone, is_gone) = tokio::sync::oneshot::channel();
    let link = Link::Packet(PacketLink::new(descriptor));
    network
        .attach_then(link, guest_spec(vm), move || {
            // Nobody waits any more when the dataplane ends first.
            let _ = gone.send(());
        })
        .map_err(RunError::System)?;
    Ok(Box::pin(async move {
        let _ = is_gone.await;
    }))
}

fn guest_spec(vm: &VmConfig) -> GuestSpec {
    GuestSpec {
        name: vm.name.clone(),
        labels: vm.labels.clone(),
        own_policy: vm.own_policy.clone(),
        mode: vm.mode,
        resolver_patience: vm.resolver_patience,
        pinned_mac: vm.mac,
        pinned_address: vm.address,
    }
}
