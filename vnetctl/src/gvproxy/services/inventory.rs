//! `/leases`, `/services/dhcp/leases` and `/cam`: who is on the network, as gvproxy has it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use vnet_proto::v1;

use super::Services;
use super::answer::Answer;

impl Services {
    /// The addresses that are given or kept, and for whom: the gateway's, those of the configuration, and those that
    /// VMs have. IPv4 alone, as leases are.
    pub(super) async fn leases(&self) -> Result<Answer, Answer> {
        let vms = self.control.list_vms().await?;
        let mut leases: BTreeMap<String, String> = self
            .static_leases
            .iter()
            .map(|(address, mac)| (address.to_string(), mac.to_string()))
            .collect();
        for vm in vms.iter().filter(|vm| !vm.mac.is_empty()) {
            let ipv4 = vm
                .addresses
                .iter()
                .filter(|address| address.parse::<Ipv4Addr>().is_ok());
            leases.extend(ipv4.map(|address| (address.clone(), vm.mac.clone())));
        }
        leases.insert(self.gateway_ip.to_string(), self.gateway_mac.to_string());
        Ok(Answer::json(&leases))
    }

    /// The MAC addresses that are connected, each with the number of its connection: from 0, in the order in which
    /// those that are there came. A VM that has said nothing has a number, and no MAC address yet.
    pub(super) async fn cam(&self) -> Result<Answer, Answer> {
        let mut vms = self.control.list_vms().await?;
        vms.retain(|vm| vm.state() == v1::VmState::Attached);
        vms.sort_by_key(|vm| {
            let at = vm.attached_at.unwrap_or_default();
            (at.seconds, at.nanos, vm.name.clone())
        });
        let cam: BTreeMap<&str, usize> = vms
            .iter()
            .enumerate()
            .filter(|(_, vm)| !vm.mac.is_empty())
            .map(|(number, vm)| (vm.mac.as_str(), number))
            .collect();
        Ok(Answer::json(&cam))
    }
}
