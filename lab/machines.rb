# frozen_string_literal: true

# The lab's machines, read from a topology's inventory, so that no host is described twice.
#
#   machines = Lab.machines("inventory/couchdb/hosts.yml")
#   machines.first.address  # => "192.168.56.11"
#
# Run by itself, it prints them as JSON for the lab's Python:  ruby lab/machines.rb HOSTS.YML

require "ipaddr"
require "json"
require "yaml"

module Lab
  # VirtualBox lets an ordinary user have host-only networks in 192.168.56.0/21 alone, and the
  # inventory's addresses are the same under every provider.
  SUBNET = "192.168.56.0/24"

  # Operating system in the inventory => what each provider boots.
  SYSTEMS = {
    "debian12" => { image: "localhost/iot-lab/debian12", box: "debian/bookworm64" },
    "debian13" => { image: "localhost/iot-lab/debian13", box: "debian/trixie64" },
  }.freeze

  # What a host must say of itself, and which group's or host's variable says it.
  KEYS = %w[ansible_host vm_memory_mb vm_cpus vm_os].freeze

  HOST_NAME = /\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\z/

  Machine = Struct.new(:name, :address, :memory_mb, :cpus, :os, :groups, keyword_init: true) do
    def image
      SYSTEMS.fetch(os)[:image]
    end

    def box
      SYSTEMS.fetch(os)[:box]
    end

    # On this machine's loopback, of its own among the machines of the subnet.
    def ssh_port
      22_000 + IPAddr.new(address).to_i % 256
    end
  end

  # Variables that a host gets from one place: a group, or itself.
  Layer = Struct.new(:group, :depth, :variables, keyword_init: true)

  # An inventory that does not describe machines the lab can boot.
  class InventoryError < StandardError; end

  module_function

  # The machines of an inventory file, in its order. Raises InventoryError, naming the file, the
  # host and what to change.
  def machines(path)
    hosts = host_variables(path)
    raise InventoryError, "#{path}: no hosts under 'all'" if hosts.empty?

    found = hosts.map { |name, variables| machine(path, name, variables) }
    found.group_by(&:address).each do |address, sharing|
      next if sharing.one?

      raise InventoryError, "#{path}: ansible_host #{address} is given to " \
                            "#{sharing.map(&:name).join(" and ")}; addresses must differ"
    end
    found
  end

  # Variables of every host in the file, merged as Ansible does: group variables from the top
  # down, the host's own last. "groups" holds the groups that the host is in.
  def host_variables(path)
    layers = Hash.new { |hash, name| hash[name] = [] }
    collect(path, "all", load(path).fetch("all"), [], layers)
    layers.transform_values do |of_host|
      merged = of_host.sort_by.with_index { |layer, index| [layer.depth, index] }
                      .map(&:variables).reduce({}, :merge)
      merged.merge("groups" => of_host.map(&:group).compact.uniq.sort - ["all"])
    end
  end

  def load(path)
    tree = YAML.safe_load(File.read(path), aliases: true)
    return tree if tree.is_a?(Hash) && tree["all"].is_a?(Hash)

    raise InventoryError, "#{path}: expected a mapping with the key 'all'"
  rescue Errno::ENOENT
    topologies = Dir[File.join(File.dirname(path, 2), "*", "group_vars", "all", "lab.yml")]
                 .map { |file| File.basename(File.dirname(file, 3)) }.sort
    raise InventoryError, "#{path}: no such inventory; TOPOLOGY is one of: #{topologies.join(", ")}"
  rescue Psych::Exception => e
    raise InventoryError, "#{path}: #{e.message}"
  end

  # Walks a group, adding to each host's layers. A host's own variables win over any group's.
  def collect(path, group, content, above, layers)
    content ||= {}
    raise InventoryError, "#{path}: group '#{group}' must be a mapping" unless content.is_a?(Hash)

    above += [Layer.new(group: group, depth: above.length, variables: content["vars"] || {})]
    (content["hosts"] || {}).each do |name, own|
      layers[name].concat(above)
      layers[name] << Layer.new(depth: Float::INFINITY, variables: own || {})
    end
    (content["children"] || {}).each do |child, below|
      collect(path, child, below, above, layers)
    end
  end

  def machine(path, name, variables)
    unless HOST_NAME.match?(name.to_s)
      raise InventoryError, "#{path}: '#{name}' is no host name (lower-case letters, digits and " \
                            "hyphens; the lab expands no ranges, so name each host)"
    end
    missing = KEYS.reject { |key| variables.key?(key) }
    unless missing.empty?
      raise InventoryError, "#{path}: host '#{name}' lacks #{missing.join(", ")}"
    end

    Machine.new(
      name: name,
      address: address(path, name, variables["ansible_host"]),
      memory_mb: number(path, name, variables, "vm_memory_mb", 256),
      cpus: number(path, name, variables, "vm_cpus", 1),
      os: system(path, name, variables["vm_os"]),
      groups: variables["groups"]
    )
  end

  def address(path, name, value)
    usable = begin
      ip = IPAddr.new(value)
      range = IPAddr.new(SUBNET).to_range
      # The first address is the network's, the second the machine's own, the last broadcast.
      ip.ipv4? && range.include?(ip) && ![range.first, range.first.succ, range.last].include?(ip)
    rescue IPAddr::Error, NoMethodError
      false
    end
    return value if usable

    raise InventoryError, "#{path}: host '#{name}': ansible_host must be an address in #{SUBNET} " \
                          "from .2 to .254, not #{value.inspect}"
  end

  def number(path, name, variables, key, least)
    value = variables[key]
    return value if value.is_a?(Integer) && value >= least

    raise InventoryError, "#{path}: host '#{name}': #{key} must be a whole number from #{least} " \
                          "up, not #{value.inspect}"
  end

  def system(path, name, value)
    return value if SYSTEMS.key?(value)

    raise InventoryError, "#{path}: host '#{name}': vm_os must be one of " \
                          "#{SYSTEMS.keys.join(", ")}, not #{value.inspect}"
  end
end

if $PROGRAM_NAME == __FILE__
  begin
    abort("usage: ruby #{$PROGRAM_NAME} HOSTS.YML") unless ARGV.one?
    machines = Lab.machines(ARGV.first)
    puts JSON.generate(
      subnet: Lab::SUBNET,
      machines: machines.map do |machine|
        machine.to_h.merge(image: machine.image, box: machine.box, ssh_port: machine.ssh_port)
      end
    )
  rescue Lab::InventoryError => e
    abort("lab: #{e.message}")
  end
end
