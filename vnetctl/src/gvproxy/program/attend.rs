//! What the controlplane tells of this network's VMs and of what they ask, as lines of the log and as notifications.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::time::Duration;

use tokio::time::Instant;
use vnet_proto::v1;

use super::log;
use super::notify::{Details, Kind, Notification, Notifier};
use crate::client::Connection;
use crate::cmd::attend::{Attendant, Seen};
use crate::cmd::questions::{Act, Questions};
use crate::gvproxy::own;

/// VMs whose state is remembered.
const VMS_MAX: usize = 8192;
/// How long a VM is waited for that is not in the first list of a controlplane: one that was started anew knows of none
/// before the dataplane is back, which dials every five seconds at least.
const RETURN_GRACE: Duration = Duration::from_secs(10);
/// Pending requests that are remembered to have been told of; one beyond is told of again when the watch begins anew.
const PENDING_MAX: usize = 8192;

/// Follows one dataplane's VMs.
pub(super) struct Watch {
    attendant: Attendant,
    told: Told,
    /// When those that were not told of again are taken for gone.
    settles_at: Option<Instant>,
    questions: Questions,
    notifier: Notifier,
}

/// What was told of each VM.
struct Told {
    command: String,
    /// Where what the command line cannot say stands.
    own_file: String,
    vms: HashMap<String, Vm>,
    /// Something can be held, which was told.
    holds: bool,
    /// Ids of pending requests.
    pending: HashSet<String>,
    /// Those from before the watch began anew, which have not been listed again.
    earlier: HashSet<String>,
}

#[derive(Debug, Default, PartialEq)]
struct Vm {
    mac: String,
    leased: String,
    /// Not told since the watch began anew.
    is_stale: bool,
    /// Its hypervisor closed the connection, which was told, and may come back.
    is_away: bool,
}

impl Watch {
    pub(super) fn start(
        connection: Connection,
        dataplane: String,
        command: String,
        notifier: Notifier,
    ) -> Self {
        let own_file = own::path(|name| std::env::var_os(name));
        let own_file = own_file.map_or("vnet/gvproxy.yaml".to_owned(), |path| path.display().to_string());
        Self {
            attendant: Attendant::start(connection, dataplane),
            settles_at: None,
            questions: Questions::new(false, command.clone()),
            told: Told {
                command,
                own_file,
                vms: HashMap::new(),
                holds: false,
                pending: HashSet::new(),
                earlier: HashSet::new(),
            },
            notifier,
        }
    }

    /// Returns when the watch has begun, so that whatever comes from now on will be told. Nothing is told before, but
    /// that there is no controlplane.
    pub(super) async fn begin(&mut self) {
        loop {
            let seen = self.attendant.next().await;
            let has_begun = matches!(seen, Seen::Began);
            self.see(seen);
            if has_begun {
                return;
            }
        }
    }

    /// Tells of what happens, for ever. Cancel safe.
    pub(super) async fn follow(&mut self) -> Infallible {
        loop {
            let settled = async {
                match self.settles_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let seen = tokio::select! {
                biased;
                seen = self.attendant.next() => seen,
                () = settled => {
                    self.settles_at = None;
                    let news = self.told.settled();
                    self.tell(news);
                    continue;
                }
            };
            self.see(seen);
        }
    }

    fn see(&mut self, seen: Seen) {
        let acts = match seen {
            Seen::Began => {
                self.told.begin_again();
                self.questions.begin_again()
            }
            Seen::Vm(vm) => {
                if self.told.may_hold(&vm) {
                    let command = &self.told.command;
                    tracing::info!(vm = vm.name, "what is held is listed by: {command} pending list");
                }
                if let Some(line) = self.told.other_name(&vm) {
                    tracing::warn!(vm = vm.name, mac = vm.mac, "{line}");
                }
                let news = self.told.vm(&vm);
                self.tell(news);
                Vec::new()
            }
            Seen::Gone(vm) => {
                let news = self.told.gone(&vm.name, &vm.link_error);
                self.tell(news);
                Vec::new()
            }
            Seen::Synced => {
                self.settles_at = self.told.has_stale().then(|| Instant::now() + RETURN_GRACE);
                Vec::new()
            }
            Seen::Pending(change) => {
                if let Some(news) = self.told.change(&change) {
                    self.notifier.tell(news);
                }
                self.questions.change(&change)
            }
            Seen::Lost(why) => {
                log::lost_controlplane(&why);
                Vec::new()
            }
        };
        for act in acts {
            if let Act::Say(line) = act {
                tracing::warn!("{}", line.strip_prefix("vnet: ").unwrap_or(&line));
            }
        }
    }

    fn tell(&self, notifications: Vec<Notification>) {
        for notification in notifications {
            let Notification { vm, mac_address, .. } = &notification;
            match notification.kind {
                Kind::HypervisorError => {
                    tracing::error!(vm, mac = mac_address, "{}", sentence(&notification))
                }
                _ => tracing::info!(vm, mac = mac_address, "{}", sentence(&notification)),
            }
            self.notifier.tell(notification);
        }
    }
}

impl Told {
    /// The watch begins anew: a VM that is not told again until it is settled went meanwhile.
    fn begin_again(&mut self) {
        for vm in self.vms.values_mut() {
            vm.is_stale = true;
        }
        let room = PENDING_MAX.saturating_sub(self.earlier.len());
        self.earlier.extend(self.pending.drain().take(room));
    }

    fn has_stale(&self) -> bool {
        self.vms.values().any(|vm| vm.is_stale)
    }

    /// Whoever could be told of again has been: the others are gone.
    fn settled(&mut self) -> Vec<Notification> {
        let stale = self.vms.iter().filter(|(_, vm)| vm.is_stale);
        let names: Vec<String> = stale.map(|(name, _)| name.clone()).collect();
        names.iter().flat_map(|name| self.gone(name, "")).collect()
    }

    fn gone(&mut self, name: &str, link_error: &str) -> Vec<Notification> {
        let known = self.vms.remove(name);
        if known.is_none() && link_error.is_empty() {
            return Vec::new();
        }
        let is_there = known.as_ref().is_some_and(|vm| !vm.is_away);
        let mac = known.unwrap_or_default().mac;
        let of = |kind| Notification {
            mac_address: mac.clone(),
            vm: name.to_owned(),
            ..Notification::new(kind)
        };
        let mut news = Vec::new();
        if !link_error.is_empty() {
            news.push(Notification {
                error: link_error.to_owned(),
                ..of(Kind::HypervisorError)
            });
        }
        if is_there {
            news.push(of(Kind::ConnectionClosed));
        }
        news
    }

    /// Whether this is the first VM of which something can be held: in the open nothing is, nor where all is decided.
    fn may_hold(&mut self, vm: &v1::Vm) -> bool {
        let holds = matches!(vm.mode(), v1::Mode::Ask | v1::Mode::Enforce);
        let is_first = holds && !self.holds;
        self.holds |= holds;
        is_first
    }

    /// What a person should know of a VM that is new, and has not the name that its socket has for it.
    fn other_name(&self, vm: &v1::Vm) -> Option<String> {
        let v1::Vm {
            name, wanted_name, ..
        } = vm;
        let is_here = matches!(vm.state(), v1::VmState::Attached | v1::VmState::Detached);
        let is_new = is_here && !vm.mac.is_empty() && !self.vms.contains_key(name);
        (is_new && !wanted_name.is_empty()).then(|| {
            format!(
                "another VM is called {wanted_name}, so this one is {name}: what is said of {wanted_name}, as grants \
                 by its name, does not hold for it (name it with VNET_VM=NAME, or with vm: NAME in {})",
                self.own_file
            )
        })
    }

    /// What is new of a VM.
    fn vm(&mut self, vm: &v1::Vm) -> Vec<Notification> {
        let of = |kind| Notification {
            mac_address: vm.mac.clone(),
            vm: vm.name.clone(),
            ..Notification::new(kind)
        };
        let is_away = match vm.state() {
            v1::VmState::Attached => false,
            v1::VmState::Detached => true,
            // What became of it is told when its dataplane is back.
            v1::VmState::Lost | v1::VmState::Unspecified => {
                if let Some(known) = self.vms.get_mut(&vm.name) {
                    known.is_stale = false;
                }
                return Vec::new();
            }
        };
        if vm.mac.is_empty() || (!self.vms.contains_key(&vm.name) && self.vms.len() >= VMS_MAX) {
            return Vec::new();
        }
        let known = self.vms.entry(vm.name.clone()).or_default();
        known.is_stale = false;
        let mut news = Vec::new();
        let was_away = std::mem::replace(&mut known.is_away, is_away);
        if is_away && was_away {
            return news;
        }
        if known.mac.is_empty() || was_away {
            known.mac.clone_from(&vm.mac);
            known.leased.clear();
            news.push(of(Kind::ConnectionEstablished));
        }
        if vm.leased_address != known.leased {
            known.leased.clone_from(&vm.leased_address);
            if !vm.leased_address.is_empty() {
                news.push(Notification {
                    ip_address: vm.leased_address.clone(),
                    ..of(Kind::DhcpAssigned)
                });
            }
        }
        // One that came and went faster than it was told of has come all the same.
        if is_away {
            news.push(of(Kind::ConnectionClosed));
        }
        news
    }

    /// What is new of a pending request: each is told of once.
    fn change(&mut self, change: &v1::WatchPendingResponse) -> Option<Notification> {
        let request = change.request.as_ref();
        match change.change() {
            v1::PendingChange::Added => {
                let request = request?;
                let was_told = self.earlier.remove(&request.id) || self.pending.contains(&request.id);
                if self.pending.len() < PENDING_MAX {
                    self.pending.insert(request.id.clone());
                }
                (!was_told).then(|| self.pending(request))
            }
            v1::PendingChange::Removed => {
                let id = &request?.id;
                self.pending.remove(id);
                self.earlier.remove(id);
                None
            }
            // What has not been listed by now went meanwhile.
            v1::PendingChange::Synced => {
                self.earlier.clear();
                None
            }
            v1::PendingChange::Updated | v1::PendingChange::Unspecified | v1::PendingChange::Gap => None,
        }
    }

    fn pending(&self, request: &v1::PendingRequest) -> Notification {
        let details = Details {
            protocol: String::new(),
            ip: String::new(),
            port: None,
            name: request.names.first().cloned().unwrap_or_default(),
            id: request.id.clone(),
            answer: format!("{} approve {}", self.command, request.id),
        };
        Notification {
            vm: request.vm.clone(),
            details: Some(asked(request, details)),
            ..Notification::new(Kind::NetworkPolicyPending)
        }
    }
}

/// What a request asks for, in the fields of the draft.
fn asked(request: &v1::PendingRequest, details: Details) -> Details {
    use v1::target::Kind as Target;
    match request.target.as_ref().and_then(|target| target.kind.as_ref()) {
        Some(Target::Address(to)) => Details {
            protocol: protocol(to.protocol()).to_owned(),
            ip: to.prefix.split('/').next().unwrap_or_default().to_owned(),
            port: to.ports.as_ref().map(|range| range.first),
            ..details
        },
        Some(Target::Name(name)) => Details {
            protocol: "dns".to_owned(),
            name: name.name.clone(),
            ..details
        },
        // By where the port would be opened. Its protocol is none that `/network/allow` takes: a yes to a connection to
        // that place would be one to something else.
        Some(Target::Forward(forward)) => {
            let listen: Option<std::net::SocketAddr> = forward.listen.parse().ok();
            Details {
                protocol: format!("expose/{}", protocol(forward.protocol())),
                ip: listen.map(|at| at.ip().to_string()).unwrap_or_default(),
                port: listen.map(|at| at.port().into()),
                name: format!("expose to port {}", forward.guest_port),
                ..details
            }
        }
        None => details,
    }
}

fn protocol(protocol: v1::Protocol) -> &'static str {
    match protocol {
        v1::Protocol::Tcp => "tcp",
        v1::Protocol::Udp => "udp",
        v1::Protocol::Icmp | v1::Protocol::Icmpv6 => "icmp",
        v1::Protocol::Unspecified => "",
    }
}

fn sentence(of: &Notification) -> String {
    match of.kind {
        Kind::ConnectionEstablished => "a VM is there".to_owned(),
        Kind::ConnectionClosed => "a VM is gone".to_owned(),
        Kind::DhcpAssigned => format!("a VM was given {} by DHCP", of.ip_address),
        Kind::HypervisorError => of.error.clone(),
        Kind::Ready | Kind::NetworkPolicyPending => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> Told {
        Told {
            command: "vnetctl".to_owned(),
            own_file: "/home/u/.config/vnet/gvproxy.yaml".to_owned(),
            vms: HashMap::new(),
            holds: false,
            pending: HashSet::new(),
            earlier: HashSet::new(),
        }
    }

    fn vm(name: &str, state: v1::VmState, leased: &str) -> v1::Vm {
        v1::Vm {
            name: name.to_owned(),
            state: state.into(),
            mac: "02:00:00:00:00:01".to_owned(),
            leased_address: leased.to_owned(),
            ..Default::default()
        }
    }

    fn kinds(news: &[Notification]) -> Vec<Kind> {
        news.iter().map(|n| n.kind).collect()
    }

    #[test]
    fn each_thing_is_told_once_and_a_silent_guest_is_not_there_yet() {
        let mut told = told();
        let silent = v1::Vm {
            mac: String::new(),
            ..vm("a", v1::VmState::Attached, "")
        };
        assert_eq!(told.vm(&silent), []);
        assert_eq!(told.gone("a", ""), [], "nobody was told that it was there");
        assert_eq!(
            kinds(&told.vm(&vm("a", v1::VmState::Attached, ""))),
            [Kind::ConnectionEstablished]
        );
        let leased = vm("a", v1::VmState::Attached, "192.168.127.2");
        assert_eq!(kinds(&told.vm(&leased)), [Kind::DhcpAssigned]);
        assert_eq!(told.vm(&leased), []);
        assert_eq!(told.vm(&vm("a", v1::VmState::Lost, "")), []);
        let unheard = told.gone("b", "a frame of 4294967295 bytes was announced");
        assert_eq!(
            kinds(&unheard),
            [Kind::HypervisorError],
            "of one that never spoke"
        );
        let ended = told.gone("a", "a frame of 4294967295 bytes was announced");
        assert_eq!(kinds(&ended), [Kind::HypervisorError, Kind::ConnectionClosed]);
        assert!(
            ended
                .iter()
                .all(|n| n.mac_address == "02:00:00:00:00:01" && n.vm == "a")
        );
    }

    #[test]
    fn a_vm_whose_name_another_one_has_is_told_of_once_it_is_there() {
        let mut told = told();
        let other = v1::Vm {
            wanted_name: "web".to_owned(),
            ..vm("web-2", v1::VmState::Attached, "")
        };
        let silent = v1::Vm {
            mac: String::new(),
            ..other.clone()
        };
        let further = vm("web-3", v1::VmState::Attached, "");
        let line = "another VM is called web, so this one is web-2: what is said of web, as grants by its name, does \
                    not hold for it (name it with VNET_VM=NAME, or with vm: NAME in \
                    /home/u/.config/vnet/gvproxy.yaml)";
        assert_eq!(told.other_name(&silent), None);
        assert_eq!(told.other_name(&further), None, "it has what it asked for");
        assert_eq!(told.other_name(&other).as_deref(), Some(line));
        told.vm(&other);
        assert_eq!(told.other_name(&other), None);
    }

    #[test]
    fn where_what_is_held_is_listed_is_told_once_something_can_be() {
        let mut told = told();
        let mut may_hold = |mode: v1::Mode| {
            told.may_hold(&v1::Vm {
                mode: mode.into(),
                ..vm("a", v1::VmState::Attached, "")
            })
        };
        for never in [
            v1::Mode::Open,
            v1::Mode::Block,
            v1::Mode::Observe,
            v1::Mode::Quarantine,
        ] {
            assert!(!may_hold(never), "{never:?}");
        }
        assert!(may_hold(v1::Mode::Ask));
        assert!(!may_hold(v1::Mode::Ask) && !may_hold(v1::Mode::Enforce), "once");
    }

    #[test]
    fn who_is_away_is_told_of_once_and_again_when_it_is_back() {
        let mut told = told();
        let there = vm("a", v1::VmState::Attached, "192.168.127.2");
        let away = vm("a", v1::VmState::Detached, "192.168.127.2");
        let came = [Kind::ConnectionEstablished, Kind::DhcpAssigned];
        assert_eq!(kinds(&told.vm(&there)), came);
        assert_eq!(kinds(&told.vm(&away)), [Kind::ConnectionClosed]);
        assert_eq!(told.vm(&away), []);
        assert_eq!(kinds(&told.vm(&there)), came);
        assert_eq!(kinds(&told.vm(&away)), [Kind::ConnectionClosed]);
        assert_eq!(told.gone("a", ""), [], "it was told");
        let quick = [&came[..], &[Kind::ConnectionClosed]].concat();
        assert_eq!(kinds(&told.vm(&away)), quick, "in less than a report's time");
    }

    #[test]
    fn each_request_is_told_of_once_however_many_there_are_and_how_often_the_watch_begins() {
        let mut told = told();
        let change = |change: v1::PendingChange, id: usize| v1::WatchPendingResponse {
            change: change.into(),
            request: Some(v1::PendingRequest {
                id: id.to_string(),
                vm: "a".to_owned(),
                ..Default::default()
            }),
        };
        let synced = v1::WatchPendingResponse {
            change: v1::PendingChange::Synced.into(),
            request: None,
        };
        let is_told = |told: &mut Told, kind, id| told.change(&change(kind, id)).is_some();
        for id in 0..PENDING_MAX + 1 {
            assert!(is_told(&mut told, v1::PendingChange::Added, id));
        }
        assert_eq!(told.pending.len(), PENDING_MAX);

        told.begin_again();
        for id in 1..PENDING_MAX {
            assert!(!is_told(&mut told, v1::PendingChange::Added, id));
        }
        told.change(&synced);
        assert!(told.earlier.is_empty(), "nothing stays of what is gone");
        is_told(&mut told, v1::PendingChange::Removed, 1);
        assert!(is_told(&mut told, v1::PendingChange::Added, 1));
    }

    #[test]
    fn what_went_while_there_was_no_controlplane_is_told_when_it_is_back() {
        let mut told = told();
        for name in ["a", "b", "c"] {
            told.vm(&vm(name, v1::VmState::Attached, ""));
        }
        told.begin_again();
        assert_eq!(told.vm(&vm("b", v1::VmState::Attached, "")), []);
        assert_eq!(told.vm(&vm("c", v1::VmState::Lost, "")), []);
        let gone = told.settled();
        assert_eq!(kinds(&gone), [Kind::ConnectionClosed]);
        assert_eq!(gone[0].vm, "a");
        assert_eq!(told.settled(), []);
    }
}
