//! Dataplanes and VMs come and go.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tonic::Status;
use vnet_proto::model::{CLOSED_ADDRESSES, Malformed, Miss, Mode, VmId, address_from_bytes};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;

use super::closed::closed_of;
use super::events::about;
use super::limits;
use super::nat::{guarded, nat_of};
use super::{HEARTBEAT, Hub, LEASE, State};
use crate::clock::Now;
use crate::convert;
use crate::fleet::{self, DATAPLANES_MAX, Dataplane, DataplaneNo, LOOKUP_HOLD, Link, Vm};
use crate::grant::{VmGrants, VmView};
use crate::lists;
use crate::policy::{EchGuard, Effective, ListCache, Modes, OwnPolicy, QuicGuard};
use crate::refusal::Refusal;

/// The version of the session's conversation.
const PROTOCOL_VERSION: u32 = 1;
/// Messages that a session may fall behind.
pub(crate) const OUTBOX_MAX: usize = 65_536;
/// What a dataplane says of a link that failed is cut to this.
const LINK_ERROR_CHARACTERS_MAX: usize = 512;
/// Names of counts taken of one VM, of each kind.
const COUNTS_MAX: usize = 256;
/// How long a flow is held where no policy says.
const HOLD: Duration = Duration::from_secs(30);

/// One session of one dataplane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionKey {
    dataplane: DataplaneNo,
    session: u64,
}

/// What a session's task holds.
#[derive(Debug)]
pub(crate) struct Attachment {
    /// Which session.
    pub(crate) key: SessionKey,
    /// Messages for its dataplane, Welcome first.
    pub(crate) outbox: mpsc::Receiver<v1::SessionResponse>,
    /// Says that it is to end, and how.
    pub(crate) end: oneshot::Receiver<Status>,
}

impl Hub {
    /// A dataplane says Hello, from a process ([`crate::process::mark`]; empty where that is not told).
    pub(crate) fn attach(&self, mut hello: v1::Hello, process: &str) -> Result<Attachment, Status> {
        check_version(&hello)?;
        // Without the lock: a long list delays no decision.
        let mut read = Vec::new();
        let ups = std::mem::take(&mut hello.vms).into_iter();
        let ups = ups
            .map(|up| VmFacts::read(up, &self.lists, &mut read))
            .collect::<Result<Vec<_>, _>>()?;
        self.read(|state, now| {
            let attachment = state.attach(now, hello, ups, process)?;
            // What an earlier session was asked for it does not know of. Before anybody can ask this one.
            self.captures.end_of(attachment.key.dataplane);
            Ok(attachment)
        })
    }

    /// A dataplane says something else.
    pub(crate) fn handle(&self, key: SessionKey, message: Message) -> Result<(), Status> {
        let stale = || Status::aborted("another session of the same dataplane took over");
        if let Message::VmUp(up) = message {
            let facts = VmFacts::read(up, &self.lists, &mut Vec::new())?;
            return self.read(|state, now| match state.is_current(key) {
                true => state.handle_vm_up(now, key.dataplane, facts),
                false => Err(stale()),
            });
        }
        self.read(|state, now| match state.is_current(key) {
            true => state.handle(now, key.dataplane, message),
            false => Err(stale()),
        })
    }

    /// Says that the controlplane is there.
    pub(crate) fn heartbeat(&self, key: SessionKey) {
        self.read(|state, _| {
            if state.is_current(key)
                && let Some(dataplane) = state.fleet.dataplanes.get_mut(&key.dataplane)
            {
                let epoch = Some(dataplane.epoch.into());
                dataplane.send(v1::session_response::Message::Heartbeat(v1::Heartbeat { epoch }));
            }
        });
    }

    /// A session is over.
    pub(crate) fn detach(&self, key: SessionKey) {
        self.read(|state, now| {
            if state.is_current(key) {
                state.session_lost(now, key.dataplane);
                self.captures.end_of(key.dataplane);
            }
        });
    }
}

impl State {
    fn is_current(&self, key: SessionKey) -> bool {
        let dataplane = self.fleet.dataplanes.get(&key.dataplane);
        dataplane
            .and_then(|d| d.link.as_ref())
            .is_some_and(|link| link.session == key.session)
    }

    fn attach(
        &mut self,
        now: Now,
        hello: v1::Hello,
        ups: Vec<VmFacts>,
        process: &str,
    ) -> Result<Attachment, Status> {
        if hello.boot_id.len() != 16 {
            let length = hello.boot_id.len();
            return Err(Status::invalid_argument(format!(
                "boot_id is {length} bytes long (expected 16)"
            )));
        }
        // Everything is read before anything is changed.
        let subnet = |field, text| optional(field, text, |t| t.parse::<ipnet::IpNet>().ok());
        let subnets: Vec<_> = [
            subnet("subnet", &hello.subnet)?,
            subnet("subnet_ipv6", &hello.subnet_ipv6)?,
        ]
        .into_iter()
        .flatten()
        .collect();
        let gateway = optional("gateway", &hello.gateway, |t| t.parse::<IpAddr>().ok())?;
        let nat = nat_of(&hello)?;
        let closed = closed_of(&hello)?;
        let host = hello.host_addresses.clone().unwrap_or_default();
        let host_addresses = host_addresses(&host).map_err(malformed)?;

        let known = self
            .fleet
            .dataplanes
            .iter()
            .find(|(_, d)| d.boot_id == hello.boot_id)
            .map(|(n, _)| *n);
        let number = match known {
            Some(number) => number,
            None if self.fleet.dataplanes.len() >= DATAPLANES_MAX => {
                self.metrics.limits_reached.add(1);
                return Err(Status::resource_exhausted(format!(
                    "{DATAPLANES_MAX} dataplanes are known, which is the limit"
                )));
            }
            None => {
                self.last_dataplane += 1;
                self.last_dataplane
            }
        };
        let others = || self.fleet.dataplanes.iter().filter(|(n, _)| **n != number);
        let name = fleet::numbered(&hello.dataplane, |name| others().any(|(_, d)| d.name == name));
        let network = fleet::numbered(&hello.network, |name| others().any(|(_, d)| d.network == name));
        for (what, own, given) in [
            ("dataplane", &hello.dataplane, &name),
            ("network", &hello.network, &network),
        ] {
            if own != given {
                tracing::warn!(
                    what,
                    own,
                    given,
                    "a name is in use by another dataplane; start each with a name of its own"
                );
            }
        }

        self.last_session += 1;
        let key = SessionKey {
            dataplane: number,
            session: self.last_session,
        };
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let (end, ended) = oneshot::channel();
        let previous = self.fleet.dataplanes.remove(&number);
        let mut dataplane = Dataplane {
            name,
            boot_id: hello.boot_id,
            process: process.to_owned(),
            network,
            link: Some(Link {
                session: key.session,
                outbox,
                end: Some(end),
            }),
            lost_at: None,
            epoch: self.epoch,
            guarded: guarded(&subnets, &nat, host_addresses),
            subnets,
            gateway,
            nat,
            closed,
            hears_closed: hello.capabilities.iter().any(|c| c == CLOSED_ADDRESSES),
            vms: HashMap::new(),
            flows: HashMap::new(),
            // Once it is welcomed: before, it is not told to close any.
            forwards: Vec::new(),
            zones: hello.zones,
            outstanding: HashMap::new(),
            last_command: 0,
        };
        let mut old_flows = HashMap::new();
        let closed_before = previous.as_ref().map(|d| d.closed.clone()).unwrap_or_default();
        if let Some(mut previous) = previous {
            if let Some(end) = previous.link.as_mut().and_then(|link| link.end.take()) {
                let _ = end.send(Status::aborted("another session of the same dataplane took over"));
            }
            dataplane.last_command = previous.last_command;
            dataplane.vms = std::mem::take(&mut previous.vms);
            old_flows = std::mem::take(&mut previous.flows);
            let stranded = Dataplane {
                vms: HashMap::new(),
                flows: HashMap::new(),
                ..previous
            };
            self.fleet.dataplanes.insert(number, stranded);
            self.give_up_outstanding(number);
        }
        let gone: Vec<VmId> = dataplane
            .vms
            .keys()
            .copied()
            .filter(|h| !ups.iter().any(|up| up.handle == *h))
            .collect();
        let text = format!("dataplane {} connected", dataplane.name);
        tracing::info!(
            dataplane = dataplane.name,
            network = dataplane.network,
            "dataplane connected"
        );
        let network = dataplane.network.clone();
        let is_news = dataplane.closed != closed_before;
        self.fleet.dataplanes.insert(number, dataplane);
        if is_news {
            self.tell_closed(number);
        }
        self.event(
            now,
            v1::Event {
                kind: v1::EventKind::DataplaneConnected.into(),
                text,
                network,
                ..Default::default()
            },
        );
        let mut gone_askers = Vec::new();
        for handle in gone {
            if let Some(vm) = self.fleet.vm_of(number, handle) {
                gone_askers.push((vm.view.name.clone(), vm.effective.mode().is_some()));
            }
            self.vm_down(now, number, handle, String::new());
        }
        // Flows that are still there are told again below, and keep nothing of the old session.
        for (_, flow) in old_flows {
            self.budgets.remove(&flow);
            if let Some(vm) = self.fleet.vms.get_mut(&flow.vm) {
                vm.live_flows = vm.live_flows.saturating_sub(1);
            }
            self.publish_flow(v1::FlowChange::Removed, &flow, "is told anew");
        }
        let mut settings = Vec::new();
        for up in ups {
            match self.vm_up(now, number, up) {
                Ok(one) => settings.push(one),
                Err(status) => {
                    self.session_lost(now, number);
                    return Err(status);
                }
            }
        }
        self.send(
            number,
            v1::session_response::Message::Welcome(v1::Welcome {
                epoch: Some(self.epoch.into()),
                lease: convert::span(LEASE),
                heartbeat_interval: convert::span(HEARTBEAT),
                hold: convert::span(HOLD),
                vms: settings,
                closed_addresses: self.closed_by_others(number),
                judges_aliases: true,
            }),
        );
        self.count_malformed(|state| state.handle_uses(now, number, hello.uses));
        for flow in hello.live_flows {
            self.count_malformed(|state| state.handle_flow_opened(now, number, flow, true));
        }
        for binding in hello.bindings {
            self.count_malformed(|state| state.handle_binding(now, number, binding));
        }
        if let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) {
            dataplane.forwards = hello.forwards;
        }
        // By who had the name when they were opened: another may have it by now.
        for (name, was_judged) in gone_askers {
            self.asker_gone(number, &name, was_judged);
        }
        // What changed while it was away, or before this controlplane was there. It said all of its VMs: who asked and is
        // not among them does not come back.
        self.close_forwards(None, |_, _| true);
        Ok(Attachment {
            key,
            outbox: messages,
            end: ended,
        })
    }

    fn handle(&mut self, now: Now, number: DataplaneNo, message: Message) -> Result<(), Status> {
        match message {
            Message::Hello(_) => return Err(Status::failed_precondition("a second hello")),
            Message::Miss(miss) => {
                self.count_malformed(|state| {
                    let miss = Miss::try_from(miss)?;
                    state.handle_miss(now, number, miss);
                    Ok(())
                });
            }
            Message::MissEnded(ended) => self.handle_miss_ended(now, number, ended),
            Message::FlowOpened(flow) => {
                let id = vnet_proto::model::FlowId(flow.flow_id);
                if !self.count_malformed(|state| state.handle_flow_opened(now, number, flow, false)) {
                    // What cannot be read cannot be judged.
                    self.cut(None, number, vec![id], "its report is malformed");
                }
            }
            Message::FlowClosed(flow) => self.handle_flow_closed(now, number, flow),
            Message::FlowStats(stats) => {
                self.count_malformed(|state| state.handle_flow_stats(now, number, stats));
            }
            Message::Decided(decided) => {
                self.count_malformed(|state| state.handle_decided(now, number, decided));
            }
            Message::Binding(binding) => {
                self.count_malformed(|state| state.handle_binding(now, number, binding));
            }
            Message::LimitReached(reached) => self.handle_limit_reached(now, number, &reached),
            // Read before the lock was taken, see `Hub::handle`.
            Message::VmUp(_) => {}
            Message::VmStatus(status) => self.vm_status(now, number, status),
            Message::VmDown(down) => self.vm_down(now, number, VmId(down.vm), down.link_error),
            Message::HostAddresses(addresses) => {
                self.count_malformed(|state| state.host_addresses(number, &addresses));
            }
            Message::Ack(ack) => self.handle_ack(now, number, ack),
            Message::Heartbeat(_) => {}
        }
        Ok(())
    }

    /// A malformed message changes nothing and ends nothing: a guest may have had a hand in it.
    fn count_malformed(&mut self, f: impl FnOnce(&mut Self) -> Result<(), Malformed>) -> bool {
        match f(self) {
            Ok(()) => true,
            Err(e) => {
                self.metrics.malformed.add(1);
                tracing::debug!(error = %e, "malformed message of a dataplane");
                false
            }
        }
    }

    /// The addresses that the host owns changed; the dataplane has voided its cache by itself.
    fn host_addresses(&mut self, number: DataplaneNo, message: &v1::HostAddresses) -> Result<(), Malformed> {
        let addresses = host_addresses(message)?;
        if let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) {
            dataplane.guarded = guarded(&dataplane.subnets, &dataplane.nat, addresses);
        }
        // A verdict made a moment ago may have been widened over what is now guarded.
        self.revoke(None, |vm| vm.dataplane == number);
        self.cut_disallowed(None, |vm| vm.dataplane == number, "the host's addresses changed");
        Ok(())
    }

    fn handle_vm_up(&mut self, now: Now, number: DataplaneNo, facts: VmFacts) -> Result<(), Status> {
        let again = self.fleet.vm_of(number, facts.handle).is_some();
        let settings = self.vm_up(now, number, facts)?;
        let name = settings.name.clone();
        self.send(number, v1::session_response::Message::VmSettings(settings));
        let addresses = self.fleet.vms.get(&name).map(|vm| vm.addresses.clone());
        self.close_moved(number, &name, &addresses.unwrap_or_default());
        if again {
            // It may have brought another policy, mode or labels than before.
            self.change(now, None, |vm| vm.view.name == name, "the VM attached anew");
        }
        Ok(())
    }

    fn vm_up(&mut self, now: Now, number: DataplaneNo, up: VmFacts) -> Result<v1::VmSettings, Status> {
        let Some(dataplane) = self.fleet.dataplanes.get(&number) else {
            return Err(Status::aborted("the session is over"));
        };
        let instance = fleet::instance(&dataplane.boot_id, up.handle);
        let process = dataplane.process.clone();
        let known = dataplane.vms.get(&up.handle).cloned();
        let name = match &known {
            Some(name) => name.clone(),
            None => self.name_for(now, &instance, &up.name)?,
        };
        let set = self.keep(&name, &instance, &up.name, process);
        let labels = Vm::merged_labels(&up.labels, &set);
        let view = VmView {
            name: name.clone(),
            labels,
            instance,
        };
        let old = self.fleet.vms.remove(&name);
        let (live_flows, bindings, denied) = old
            .map(|vm| (vm.live_flows, vm.bindings, vm.denied))
            .unwrap_or_default();
        let effective = Arc::new(Effective::compose(now, &view, None, None, Modes::default()));
        let vm = Vm {
            view,
            handle: up.handle,
            dataplane: number,
            attached: up.attached,
            lost: false,
            host_labels: up.labels,
            set,
            own_policy: up.own_policy,
            own_mode: up.mode,
            ec2_metadata_access: up.ec2_metadata_access,
            effective,
            grants: VmGrants::default(),
            transport: up.transport,
            lookup_hold: up.lookup_hold,
            attached_at: up.attached_at,
            addresses: up.addresses,
            mac: up.mac,
            claimed_hostname: String::new(),
            leased_address: String::new(),
            link_error: String::new(),
            dropped_frames: BTreeMap::new(),
            counters: BTreeMap::new(),
            live_flows,
            bindings,
            denied,
        };
        let effective = Arc::new(self.compose(now, &vm));
        let vm = Vm {
            grants: self.grants.for_vm(&vm.view),
            effective,
            ..vm
        };
        self.fleet.vms.insert(name.clone(), vm);
        if let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) {
            dataplane.vms.insert(up.handle, name.clone());
        }
        if known.is_none() {
            self.event(
                now,
                about(v1::EventKind::VmAttached, &name, format!("{name} attached")),
            );
        }
        let change = if known.is_none() {
            v1::VmChange::Added
        } else {
            v1::VmChange::Updated
        };
        self.publish_vm(change, &name);
        self.settings_of(&name)
            .ok_or_else(|| Status::internal("the VM is not there"))
    }

    /// What a VM's dataplane must know of how it is treated.
    pub(super) fn settings_of(&self, name: &str) -> Option<v1::VmSettings> {
        let vm = self.fleet.vms.get(name)?;
        Some(v1::VmSettings {
            vm: vm.handle.0,
            name: name.to_owned(),
            switch_open: vm.effective.is_switch_open(),
            forwards_closed: vm.effective.closes_forwards(),
            synthetic_answers: vm.effective.synthetic_answers(),
            lookup_hold: convert::span(lookup_hold(vm)),
            ech_outer: vm.effective.name_guards().ech == EchGuard::Outer,
            quic_denied: vm.effective.name_guards().quic == QuicGuard::Deny,
            dns: Some(convert::dns_settings(&vm.effective)),
            loss_grace: vm
                .effective
                .settings()
                .controller_loss
                .map(|time| time.saturating_sub(LEASE))
                .filter(|grace| !grace.is_zero())
                .and_then(convert::span),
        })
    }

    fn vm_status(&mut self, now: Now, number: DataplaneNo, status: v1::VmStatus) {
        let name = self
            .fleet
            .dataplanes
            .get(&number)
            .and_then(|d| d.vms.get(&VmId(status.vm)))
            .cloned();
        let Some(vm) = name.as_ref().and_then(|name| self.fleet.vms.get_mut(name)) else {
            self.metrics.stray.add(1);
            return;
        };
        let was_attached = std::mem::replace(&mut vm.attached, status.attached);
        let mut addresses = std::mem::replace(&mut vm.addresses, status.addresses);
        let has_moved = addresses != vm.addresses || was_attached != status.attached;
        if has_moved {
            addresses.extend(vm.addresses.iter().cloned());
        }
        vm.mac = status.mac;
        vm.claimed_hostname = status.claimed_hostname;
        vm.leased_address = status.leased_address;
        let dropped = std::mem::replace(&mut vm.dropped_frames, counts(status.dropped_frames));
        let counted = std::mem::replace(&mut vm.counters, counts(status.counters));
        let reached = limits::reached([&dropped, &counted], [&vm.dropped_frames, &vm.counters]);
        let name = vm.view.name.clone();
        match (was_attached, status.attached) {
            (true, false) => {
                self.event(
                    now,
                    about(v1::EventKind::VmDetached, &name, format!("{name} detached")),
                );
            }
            (false, true) => {
                self.event(
                    now,
                    about(v1::EventKind::VmAttached, &name, format!("{name} attached")),
                );
            }
            _ => {}
        }
        self.limits_reached(now, &name, reached);
        if has_moved {
            self.close_moved(number, &name, &addresses);
        }
        self.publish_vm(v1::VmChange::Updated, &name);
    }

    /// A VM's link is gone for good.
    pub(super) fn vm_down(&mut self, now: Now, number: DataplaneNo, handle: VmId, link_error: String) {
        let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) else {
            return;
        };
        let Some(name) = dataplane.vms.remove(&handle) else {
            self.metrics.stray.add(1);
            return;
        };
        let flows: Vec<_> = dataplane.flows.extract_if(|_, flow| flow.vm == name).collect();
        for (_, flow) in flows {
            self.flow_ended(now, flow, v1::FlowEnd::VmDown, None);
        }
        let Some(vm) = self.fleet.vms.get(&name) else {
            return;
        };
        let (instance, was_judged) = (vm.view.instance.clone(), vm.effective.mode().is_some());
        self.instance_stopped(now, &instance, &name);
        for event in self.repeats.end_of(&name) {
            self.event(now, event);
        }
        let link_error: String = link_error.chars().take(LINK_ERROR_CHARACTERS_MAX).collect();
        let text = if link_error.is_empty() {
            format!("{name} is gone")
        } else {
            format!("{name} is gone: {link_error}")
        };
        if let Some(vm) = self.fleet.vms.get_mut(&name) {
            vm.link_error = link_error;
        }
        self.publish_vm(v1::VmChange::Removed, &name);
        // While it still says where the VM was.
        self.event(now, about(v1::EventKind::VmDetached, &name, text));
        self.fleet.vms.remove(&name);
        self.asker_gone(number, &name, was_judged);
    }

    fn session_lost(&mut self, now: Now, number: DataplaneNo) {
        let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) else {
            return;
        };
        dataplane.link = None;
        dataplane.lost_at = Some(now.steady);
        let (name, network) = (dataplane.name.clone(), dataplane.network.clone());
        let vms: Vec<String> = dataplane.vms.values().cloned().collect();
        tracing::info!(dataplane = name, "dataplane lost");
        self.give_up_outstanding(number);
        for vm in vms {
            if let Some(vm) = self.fleet.vms.get_mut(&vm) {
                vm.lost = true;
            }
            self.publish_vm(v1::VmChange::Updated, &vm);
        }
        self.event(
            now,
            v1::Event {
                kind: v1::EventKind::DataplaneLost.into(),
                text: format!("the session of dataplane {name} ended"),
                network,
                ..Default::default()
            },
        );
        if self
            .fleet
            .dataplanes
            .get(&number)
            .is_some_and(|d| d.vms.is_empty())
        {
            self.remove_dataplane(now, number);
        }
    }

    /// A lost dataplane's time is over.
    pub(super) fn remove_dataplane(&mut self, now: Now, number: DataplaneNo) {
        let handles: Vec<VmId> = self
            .fleet
            .dataplanes
            .get(&number)
            .map(|d| d.vms.keys().copied().collect())
            .unwrap_or_default();
        for handle in handles {
            self.vm_down(now, number, handle, String::new());
        }
        let gone = self.fleet.dataplanes.remove(&number);
        if gone.is_some_and(|dataplane| !dataplane.closed.is_empty()) {
            self.tell_closed(number);
        }
    }
}

fn check_version(hello: &v1::Hello) -> Result<(), Status> {
    if hello.protocol_version == PROTOCOL_VERSION {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "protocol version {} is not spoken here (expected {PROTOCOL_VERSION})",
        hello.protocol_version
    )))
}

/// What a VmUp says, checked.
struct VmFacts {
    handle: VmId,
    name: String,
    labels: BTreeMap<String, String>,
    transport: String,
    own_policy: Option<Arc<OwnPolicy>>,
    mode: Option<Mode>,
    ec2_metadata_access: bool,
    lookup_hold: Duration,
    attached_at: Option<std::time::SystemTime>,
    attached: bool,
    addresses: Vec<String>,
    mac: String,
}

impl VmFacts {
    /// `read` holds the policies that VMs before it brought, without their lists' content: all that bring
    /// the same share one.
    fn read(
        up: v1::VmUp,
        cache: &ListCache,
        read: &mut Vec<(v1::OwnPolicy, Arc<OwnPolicy>)>,
    ) -> Result<Self, Status> {
        fleet::check_name(&up.name).map_err(Status::invalid_argument)?;
        let own_policy = up.own_policy.map(|own| read_own(own, cache, read)).transpose()?;
        let mode = v1::Mode::try_from(up.mode)
            .map_err(|_| Malformed::Enum {
                field: "vm_up.mode",
                value: up.mode,
            })
            .and_then(Option::<Mode>::try_from)
            .map_err(malformed)?;
        let patience = up.resolver_patience.and_then(|p| Duration::try_from(p).ok());
        Ok(Self {
            handle: VmId(up.vm),
            name: up.name,
            labels: up.labels.into_iter().collect(),
            transport: up.transport,
            own_policy,
            mode,
            ec2_metadata_access: up.ec2_metadata_access,
            lookup_hold: patience.unwrap_or(LOOKUP_HOLD),
            attached_at: convert::time(up.attached_at),
            attached: up.attached,
            addresses: up.addresses,
            mac: up.mac,
        })
    }
}

fn read_own(
    own: v1::OwnPolicy,
    cache: &ListCache,
    read: &mut Vec<(v1::OwnPolicy, Arc<OwnPolicy>)>,
) -> Result<Arc<OwnPolicy>, Refusal> {
    let described = v1::OwnPolicy {
        lists: lists::described(&own.lists),
        ..own.clone()
    };
    if let Some((_, policy)) = read.iter().find(|(message, _)| *message == described) {
        return Ok(Arc::clone(policy));
    }
    // A document that was given is never empty, so that this one was not.
    let document = (!own.document.is_empty()).then_some(own.document.as_str());
    if document.is_none() && own.rules.is_empty() {
        return Err(Refusal::field(
            "own_policy",
            "it has neither a document nor rules (expected one of them; leave own_policy out to bring none)",
        ));
    }
    let lists = lists::unpack(&own.lists)?;
    let policy = OwnPolicy::parse_with(&own.source, document, &own.rules, &lists, cache);
    let policy = Arc::new(policy.map_err(Refusal::Document)?);
    // With every rule still in force: a VM that comes back after a rule's end is not to be refused for that.
    if let Some(document) = policy.document() {
        document
            .run_tests(&own.source, Now::BEFORE_ALL)
            .map_err(Refusal::Document)?;
    }
    read.push((described, Arc::clone(&policy)));
    Ok(policy)
}

pub(super) fn optional<T>(
    field: &str,
    text: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    parse(text)
        .map(Some)
        .ok_or_else(|| Status::invalid_argument(format!("hello.{field} is {text:?}, which does not parse")))
}

fn host_addresses(message: &v1::HostAddresses) -> Result<Vec<IpAddr>, Malformed> {
    message
        .addresses
        .iter()
        .map(|a| address_from_bytes("host_addresses.addresses", a))
        .collect()
}

/// Counts by name, of a bounded number: no dataplane of ours has more.
fn counts(counts: HashMap<String, u64>) -> BTreeMap<String, u64> {
    counts.into_iter().take(COUNTS_MAX).collect()
}

fn malformed(error: Malformed) -> Status {
    Refusal::from(error).into()
}
/// How long a VM's lookups may wait for their verdicts. Where policy holds nothing for a person, those that
/// need none still take their time.
fn lookup_hold(vm: &Vm) -> Duration {
    match vm.effective.approval_timeout() {
        Duration::ZERO => vm.lookup_hold,
        timeout => vm.lookup_hold.min(timeout),
    }
}
