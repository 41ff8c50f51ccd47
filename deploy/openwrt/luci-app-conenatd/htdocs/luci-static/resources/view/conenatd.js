'use strict';
'require view';
'require form';
'require fs';
'require poll';

// The options are keys of conenatd.toml: docs/configuration.md describes all of them. Those
// that this page does not show stay as they are in /etc/config/conenatd.

async function status() {
	try {
		const out = await fs.exec('/usr/bin/conenatd', [ 'status' ]);
		return (out.stdout || out.stderr || '').trim();
	} catch (e) {
		return e.message;
	}
}

return view.extend({
	load() {
		return status();
	},

	render(text) {
		const seen = E('pre', { 'id': 'conenatd-status' }, [ text ]);
		poll.add(async () => { seen.textContent = await status(); }, 5);

		const m = new form.Map('conenatd', _('Restricted cone NAT'),
			_('Peers that an inside host has sent a UDP packet to may answer from any port, and nobody else may.'));
		let s, o;

		s = m.section(form.NamedSection, 'main', 'conenatd');
		o = s.option(form.Flag, 'enabled', _('Enabled'));
		o.rmempty = false;

		o = s.option(form.ListValue, 'backend', _('Backend'),
			_('What carries permissions in the kernel: an nftables map, conntrack expectations, or whichever gets through.'));
		o.value('', 'auto');
		o.value('nft');
		o.value('expect');

		o = s.option(form.Value, 'lifetime', _('Lifetime'),
			_('How long a permission lasts after the inside host was last heard.'));
		o.placeholder = '5m';

		s.option(form.DynamicList, 'outside', _('Outside links'),
			_('In addition to those that are found. Names of links, such as pppoe-wan.'));
		s.option(form.DynamicList, 'exclude_ports', _('Outside ports without permissions'));

		o = s.option(form.DynamicList, 'exclude_peer_ports', _('Peer ports without permissions'));
		o.placeholder = '53, 123, 443';

		s.option(form.DynamicList, 'exclude_peers', _('Peers without permissions'), _('Prefixes.'));
		s.option(form.DynamicList, 'peer_groups', _('Peers that belong together'), _('Prefixes.'));
		s.option(form.Flag, 'self', _('Also for programs of this router'));
		s.option(form.Flag, 'hairpin', _('Hairpin'),
			_('Let inside hosts reach each other at their outside endpoints. Needs endpoint-independent mapping.'));

		s = m.section(form.GridSection, 'subnet', _('Subnets'));
		s.anonymous = true;
		s.addremove = true;

		o = s.option(form.Value, 'prefix', _('Prefix'), _('A prefix, a link such as br-lan, or auto.'));
		o.rmempty = false;

		o = s.option(form.ListValue, 'filtering', _('Filtering'));
		o.value('', 'address_dependent');
		o.value('endpoint_independent');
		o.value('address_and_port_dependent');

		o = s.option(form.ListValue, 'mapping', _('Mapping'));
		o.value('', 'kernel');
		o.value('endpoint_independent');

		s.option(form.Flag, 'routed', _('Routed'), _('Without source NAT.'));

		return m.render().then((nodes) => E([], [ E('h3', {}, [ _('Status') ]), seen, nodes ]));
	}
});
